"""Several adapters in one forward pass: every row computes what it would compute alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline import adapters
from pipeline.adapters.base import Init
from pipeline.adapters.hificl import HiFICL, HiFICLOptions
from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import InputError

PACKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ragged": [
        ("hificl", {"num_virtual_tokens": 2, "rank": 1}),
        ("hificl", {"num_virtual_tokens": 8}),
        ("hificl", {"num_virtual_tokens": 5, "lowrank_k": False, "lowrank_v": False}),
    ],
    "equal": [("hificl", {}), ("hificl", {}), ("hificl", {})],
    "variants": [("hificl", {"alpha": "one"}), ("hificl", {}), ("hificl", {"alpha_init": "identity"})],
    "mimic": [("mimic", {}), ("mimic", {"shift": "blend"}), ("mimic", {"shift": "linear"})],
    "live": [("live", {}), ("live", {}), ("live", {})],
    "points": [("live", {}), ("live", {"point": "residual"}), ("hificl", {})],
    "before": [("prefix", {"num_virtual_tokens": 3}), ("prompt", {"num_virtual_tokens": 2}), ("prompt", {})],
    "behind": [("bottleneck", {"width": 2}), ("m2iv", {}), ("bottleneck", {"width": 5, "places": ["mlp"]})],
    "from demonstrations": [("ct-kv", {"num_virtual_tokens": 5}), ("i2cl", {}), ("m2iv", {})],
    "routers": [("moe-hificl", {"num_virtual_tokens": 3, "rank": 2}), ("hificl", {}), ("moe-hificl", {"experts": 2})],
    "a router and no tokens": [("moe-hificl", {"heads": "kv"}), ("live", {}), ("mimic", {})],
    "every place": [("prompt", {}), ("m2iv", {}), ("live", {"point": "residual"})],
    "all": [("hificl", {"num_virtual_tokens": 3}), ("mimic", {}), ("live", {}), ("mimic", {"shift": "linear"})],
}
ROWS = [2, 0, 1, 0, 2]


def made(model: Any, methods: list[tuple[str, dict[str, Any]]], dtype: torch.dtype) -> list[Any]:
    out = []
    for seed, (method, options) in enumerate(methods):
        adapter = adapters.create(method, model, seed=seed, **options)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
        out.append(adapter.to(dtype))
    return out


def of_rows(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    return {k: v[rows] for k, v in batch.items()}


@pytest.mark.parametrize("family", ["idefics2", "llava"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("pack", PACKS)
def test_rows_equal_their_adapter_alone(
    pack: str, family: str, dtype: torch.dtype, bound: float, tiny: Any, inputs: Any
) -> None:
    model = tiny(family, dtype=dtype)
    rows = [*ROWS, 3] if pack == "all" else ROWS
    batch = inputs(model, batch=len(rows))
    weights = torch.randn(len(rows), generator=torch.Generator().manual_seed(5)).to(dtype)
    together = made(model, PACKS[pack], dtype)
    with adapters.attach(model, together, rows=rows):
        packed = model(**batch).logits
        (packed.square().mean((1, 2)) * weights).sum().backward()
    for i, alone in enumerate(made(model, PACKS[pack], dtype)):
        mine = [b for b, row in enumerate(rows) if row == i]
        with adapters.attach(model, alone):
            solo = model(**of_rows(batch, mine)).logits
            (solo.square().mean((1, 2)) * weights[mine]).sum().backward()
        torch.testing.assert_close(packed[mine], solo, rtol=0, atol=bound)
        for a, b in zip(together[i].parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=bound, atol=bound)


def test_rows_may_change_between_steps_and_beams_follow_their_row(tiny: Any, inputs: Any) -> None:
    model = tiny("idefics2", dtype=torch.float64)
    model.generation_config.eos_token_id = None
    together = made(model, PACKS["ragged"], torch.float64)
    batch = inputs(model, batch=2)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "suppress_tokens": [299]}
    with adapters.attach(model, together, rows=[0, 0]) as pack:
        for rows in ([0, 1], [2, 1], [1, 1]):
            pack.use(rows)
            with torch.no_grad():
                found = model(**batch).logits
            generated = model.generate(**batch, **settings)
            assert pack.rows == adapters.PackRows(tuple(rows))
            expected = [None, None]
            pack_of_one = [made(model, PACKS["ragged"], torch.float64)[r] for r in rows]
            for b, adapter in enumerate(pack_of_one):
                other = tiny("idefics2", dtype=torch.float64)
                other.generation_config.eos_token_id = None
                with adapters.attach(other, adapter), torch.no_grad():
                    one = of_rows(batch, [b])
                    torch.testing.assert_close(found[b : b + 1], other(**one).logits, rtol=0, atol=1e-12)
                    expected[b] = other.generate(**one, **settings)
            assert torch.equal(generated, torch.cat(expected))


def test_parameters_may_change_between_steps(tiny: Any, inputs: Any) -> None:
    model = tiny("llava")
    batch = inputs(model)
    adapter = made(model, [("hificl", {})], torch.float32)[0]
    with adapters.attach(model, adapter), torch.no_grad():
        before = model(**batch).logits
        adapter.v_b.data.mul_(2.0)
        after = model(**batch).logits
    assert not torch.equal(before, after)
    with adapters.attach(model, adapter), torch.no_grad():
        assert torch.equal(model(**batch).logits, after)


def test_rows_are_checked(tiny: Any, inputs: Any) -> None:
    model = tiny("llava")
    batch = inputs(model, batch=3)
    together = made(model, PACKS["equal"], torch.float32)
    with adapters.attach(model, together) as pack:
        with pytest.raises(InputError, match="rows"):
            model(**batch)
        with pytest.raises(InputError, match="from 0 to 2"):
            pack.use([0, 3, 1])
        pack.use([0, 1])
        with pytest.raises(InputError, match="3 rows"):
            model(**batch)
        with pytest.raises(InputError, match="3 rows, and 2 numbers of images"):
            adapters.PackRows((0, 1, 2), images=(1, 1))


def test_a_method_that_does_not_pack_is_refused(tiny: Any) -> None:
    class Alone(HiFICL):
        packable = False  # type: ignore[assignment]

    model = tiny("llava")
    alone = Alone(HiFICLOptions(), decoder_of(model), Init(0, torch.device("cpu")))
    with pytest.raises(InputError, match="does not pack"):
        adapters.Pack([adapters.create("hificl", model), alone])
