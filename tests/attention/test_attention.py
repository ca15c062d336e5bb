"""The kernel against explicit concatenation: outputs and every gradient, in fp64; error bounds in low precision."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.attention import kernels, softmax
from pipeline.attention.virtual import (
    merge_attention,
    merge_attention_reference,
    mimic_attention,
    mimic_attention_reference,
    virtual_attention,
)
from pipeline.core.errors import InputError

TOLERANCE = 1e-12
SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "groups": st.integers(1, 4),
        "kv_heads": st.integers(1, 3),
        "queries": st.sampled_from([1, 2, 5, 17]),
        "past": st.sampled_from([0, 0, 3, 40]),
        "size": st.sampled_from([4, 8, 16]),
        "seed": st.integers(0, 10_000),
    }
)
MASKS = st.sampled_from([None, "bool", "additive", "per-head", "left-padding"])


def draw(shape: dict[str, int]) -> tuple[torch.Generator, list[Tensor]]:
    generator = torch.Generator().manual_seed(shape["seed"])
    heads, keys = shape["groups"] * shape["kv_heads"], shape["queries"] + shape["past"]
    # transformers hands over queries that are a transposed view
    q = normal(generator, shape["batch"], shape["queries"], heads, shape["size"]).transpose(1, 2)
    k, v = (normal(generator, shape["batch"], shape["kv_heads"], keys, shape["size"]) for _ in range(2))
    return generator, [q, k, v]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mask_of(kind: str | None, shape: dict[str, int], generator: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    batch, queries, keys = shape["batch"], shape["queries"], shape["queries"] + shape["past"]
    if kind == "left-padding":  # the first rows of the first sample see nothing
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, 1, -1, -1).clone()
        mask[0, :, :, : keys // 2 + 1] = False
        return mask
    heads = shape["groups"] * shape["kv_heads"] if kind == "per-head" else 1
    mask = torch.rand(batch, heads, queries, keys, generator=generator) > 0.3
    mask[0, :, :1] = False
    return mask if kind != "additive" else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


def assert_same(ours: Any, reference: Any, tensors: list[Tensor], generator: torch.Generator, **kwargs: Any) -> None:
    results = []
    for f in (ours, reference):
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
        out = f(*leaves, **kwargs)
        results.append((out, leaves))
    grad = torch.randn(results[0][0].shape, generator=generator, dtype=torch.float64)
    (a, leaves_a), (b, leaves_b) = results
    gradients = [torch.autograd.grad(out, leaves, grad) for out, leaves in results]
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(ours(*leaves_a, **kwargs), b, rtol=0, atol=TOLERANCE)


assert_merges = partial(assert_same, merge_attention, merge_attention_reference)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    mask=MASKS,
    n=st.integers(1, 9),
    batched=st.booleans(),
    alpha=st.sampled_from(["full", "one"]),
    hidden=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    joins=st.booleans(),
)
def test_merge_equals_concatenation(
    shape: dict[str, int], mask: str | None, n: int, batched: bool, alpha: str, hidden: bool, scale: float | None,
    joins: bool,
) -> None:  # fmt: skip
    generator, tensors = draw(shape)
    heads = shape["groups"] * shape["kv_heads"]
    learned = (*([shape["batch"]] if batched else []), heads, n, shape["size"])
    tensors += [normal(generator, *learned), normal(generator, *learned)]
    virtual_mask = None
    if hidden:
        virtual_mask = torch.arange(n) < torch.randint(0, n + 1, (shape["batch"], 1, 1), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "MOST_TOKENS", 256 if joins else 0)
        given_mask = mask_of(mask, shape, generator)
        assert_merges(tensors, generator, alpha=alpha, scale=scale, mask=given_mask, virtual_mask=virtual_mask)


def test_short_sequences_are_joined_where_something_below_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, (q, k, v) = draw({"batch": 2, "groups": 2, "kv_heads": 1, "queries": 4, "past": 0, "size": 8, "seed": 4})
    keys, values = (normal(generator, 2, 3, 8).requires_grad_() for _ in range(2))
    calls = []
    original = softmax.concatenated
    monkeypatch.setattr(softmax, "concatenated", lambda *x, **y: calls.append(1) or original(*x, **y))
    merge_attention(q, k, v, keys, values)
    merge_attention(q.requires_grad_(), k, v, keys, values, alpha="one")
    merge_attention(q, k, v, keys.float(), values.float())
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    merge_attention(q, k, v, keys, values, mask=nothing)
    assert not calls
    merge_attention(q, k, v, keys, values)
    merge_attention(q, k, v, keys, values, mask=~nothing)
    assert calls == [1, 1]


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, mask=MASKS, dims=st.sampled_from([2, 3, 4]), form=st.sampled_from(["vector", "blend"]))
def test_mimic_equals_its_formula(shape: dict[str, int], mask: str | None, dims: int, form: str) -> None:
    generator, tensors = draw(shape)
    batch, heads, queries, size = tensors[0].shape
    shift = {2: (heads, size), 3: (batch, heads, size), 4: (batch, heads, queries, size)}[dims]
    tensors += [normal(generator, *shift), normal(generator, batch, heads, queries)]
    assert_same(
        mimic_attention, mimic_attention_reference, tensors, generator, form=form, mask=mask_of(mask, shape, generator)
    )


@pytest.mark.parametrize("alpha", ["full", "one"])
@pytest.mark.parametrize("mask", [None, "left-padding"])
def test_plain_backend_gives_what_flash_gives(alpha: Any, mask: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"batch": 2, "groups": 2, "kv_heads": 2, "queries": 5, "past": 3, "size": 8, "seed": 0}
    generator, tensors = draw(shape)
    tensors += [normal(generator, 4, 3, 8), normal(generator, 4, 3, 8)]
    monkeypatch.setattr(kernels, "_backend", lambda *_: "plain")
    assert_merges(tensors, generator, alpha=alpha, mask=mask_of(mask, shape, generator))


def test_rows_of_both_forms_share_one_call() -> None:
    generator, (q, k, v) = draw({"batch": 2, "groups": 2, "kv_heads": 2, "queries": 5, "past": 0, "size": 8, "seed": 1})
    keys, values = normal(generator, 2, 4, 3, 8), normal(generator, 2, 4, 3, 8)

    def mixed(*x: Tensor) -> Tensor:
        return virtual_attention(x[0], x[1], x[2], keys=x[3], values=x[4], replaces=torch.tensor([True, False]))

    def each(*x: Tensor) -> Tensor:
        return torch.cat(
            [
                merge_attention_reference(*(t[i : i + 1] for t in x), alpha=alpha)
                for i, alpha in enumerate(("full", "one"))
            ]
        )

    assert_same(mixed, each, [q, k, v, keys, values], generator)


def test_a_row_without_context_attends_to_the_virtual_tokens() -> None:
    generator, (q, k, v) = draw({"batch": 1, "groups": 1, "kv_heads": 2, "queries": 3, "past": 0, "size": 8, "seed": 2})
    keys, values = normal(generator, 2, 3, 8), normal(generator, 2, 3, 8)
    out = merge_attention(q, k, v, keys, values, mask=torch.zeros(1, 1, 3, 3, dtype=torch.bool))
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys[None], values[None])
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["merge", "one", "vector", "blend"])
def test_low_precision_errs_at_most_twice_what_plain_low_precision_does(dtype: torch.dtype, kind: str) -> None:
    generator, tensors = draw({"batch": 2, "groups": 2, "kv_heads": 2, "queries": 40, "past": 8, "size": 64, "seed": 3})
    if kind in ("merge", "one"):
        tensors += [normal(generator, 4, 8, 64), normal(generator, 4, 8, 64)]
        f, plain, options = merge_attention, merge_attention_reference, {"alpha": "full" if kind == "merge" else "one"}
    else:
        tensors += [normal(generator, 4, 64), normal(generator, 2, 4, 40)]
        f, plain, options = mimic_attention, mimic_attention_reference, {"form": kind}
    low = [x.to(dtype) for x in tensors]
    grad = torch.randn(low[0].shape, generator=generator).to(dtype)

    def run(function: Any, wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in low]
        out = function(*leaves, **options)
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(wide)))]

    exact, theirs, ours = run(plain, torch.float64), run(plain, dtype), run(f, dtype)
    for i, (e, t, o) in enumerate(zip(exact, theirs, ours, strict=True)):
        assert (o - e).norm() <= 2 * (t - e).norm(), f"tensor {i}"
        assert (o - e).abs().max() <= 2 * (t - e).abs().max(), f"tensor {i}"


def test_nothing_below_learns_then_the_flash_backward_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, (q, k, v) = draw({"batch": 1, "groups": 2, "kv_heads": 1, "queries": 4, "past": 0, "size": 8, "seed": 4})
    keys, values = (normal(generator, 2, 3, 8).requires_grad_() for _ in range(2))
    calls = []
    monkeypatch.setattr(softmax, "MOST_TOKENS", 0)
    original = kernels._BACKWARD["cpu"]
    monkeypatch.setitem(kernels._BACKWARD, "cpu", lambda *x: calls.append(1) or original(*x))
    merge_attention(q, k, v, keys, values).sum().backward()
    assert not calls and keys.grad is not None
    merge_attention(q.requires_grad_(), k, v, keys, values).sum().backward()
    assert calls == [1]


def test_autocast_does_not_narrow_the_virtual_side() -> None:
    generator, tensors = draw({"batch": 1, "groups": 1, "kv_heads": 2, "queries": 4, "past": 0, "size": 8, "seed": 5})
    tensors = [x.float() for x in (*tensors, normal(generator, 2, 3, 8), normal(generator, 2, 3, 8))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = merge_attention(*tensors)
    assert torch.equal(out, merge_attention(*tensors))


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": (1, 3, 4, 8)},
        {"v": (1, 2, 5, 8)},
        {"k_learn": (3, 2, 8)},
        {"v_learn": (2, 4, 2, 8)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    right = {"q": (1, 4, 4, 8), "k": (1, 2, 4, 8), "v": (1, 2, 4, 8), "k_learn": (4, 2, 8), "v_learn": (4, 2, 8)}
    shapes = {**right, **wrong}
    with pytest.raises(InputError, match="fit"):
        merge_attention(*(torch.randn(shape) for shape in shapes.values()))
