"""`point`: its default, its names, and what records and adapters of before there was one mean by leaving it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import adapters, methods
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from tests.adapters.conftest import logits, stirred

TEACHES: list[tuple[str, dict[str, Any], str, str]] = [  # method, options, state that is compared now, and was before
    ("mimic", {}, "mlp", "residual"),
    ("mimic", {"shift": "linear", "alignment": "ffn"}, "mlp", "residual"),
    ("mimic", {"alignment": "attention"}, "attention", "attention"),
    ("hificl", {"teacher": True}, "mlp", "residual"),
    ("lora", {"teacher": True}, "mlp", "residual"),
    ("lora-mini", {"teacher": True}, "mlp", "residual"),
    ("mimic+lora", {}, "mlp", "residual"),
    ("mimic+lora", {"mimic": {"alignment": "attention"}}, "attention", "attention"),
    ("hificl+lora", {"hificl": {"teacher": True}}, "mlp", "residual"),
]


POINTS = ("mlp", "residual", "attention")


def without_point(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as a record of before `point` has them."""
    found = {name: without_point(value) if isinstance(value, dict) else value for name, value in options.items()}
    return {name: value for name, value in found.items() if name != "point"}


@pytest.mark.parametrize(("method", "options", "now", "before"), TEACHES)
def test_the_ffns_output_is_compared_and_an_old_trial_compares_what_it_did(
    method: str, options: dict[str, Any], now: str, before: str
) -> None:
    full = methods.parse(method, options).plain()
    assert methods.parse(method, options).facts().kind == ("hidden", now)
    base = {"backbone": "b", "backbone_digest": "0", "task": "t", "manifest_digest": "1", "method": method}
    assert methods.facts(TrialConfig(**base, options=full)).kind == ("hidden", now)
    assert methods.facts(TrialConfig(**base, options=without_point(full))).kind == ("hidden", before)


def test_what_is_compared_can_be_the_residual_stream_behind_either() -> None:
    for alignment, state in (("ffn", "residual"), ("attention", "residual-mid")):
        assert methods.parse("mimic", {"alignment": alignment, "point": "residual"}).facts().state == state
    assert methods.parse("hificl", {"teacher": True, "point": "residual"}).facts().state == "residual"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alignment": "attention", "point": "mlp"}, "with alignment 'attention' it is 'attention' or 'residual'"),
        ({"point": "attention"}, "with alignment 'ffn' it is 'mlp' or 'residual'"),
        ({"point": "ffn"}, "point: Input should be 'mlp', 'attention' or 'residual', got 'ffn'"),
        ({"alignment": "mlp"}, "alignment: Input should be 'ffn' or 'attention', got 'mlp'"),
    ],
)
def test_a_point_that_is_not_its_alignments_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        methods.parse("mimic", options).plain()


@pytest.mark.parametrize("method", ["hificl", "lora", "lora-mini", "hificl+lora"])
def test_without_a_teacher_a_point_is_no_part_of_the_trial(method: str) -> None:
    plain = methods.parse(method, {}).plain()
    assert "point" not in json.dumps(plain)
    if "point" in methods.option_names(method):
        assert methods.parse(method, {"point": "residual"}).plain() == plain


@pytest.mark.parametrize("method", ["live", "mimic", "hificl", "mimic+lora"])
def test_an_old_adapter_computes_what_it_did(method: str, tiny: Any, inputs: Any, tmp_path: Path) -> None:
    model = tiny("idefics2")
    batch = inputs(model)
    taught = {"teacher": True} if method == "hificl" else {}
    options = {**taught, **({} if "+" in method else {"point": "residual"})}
    adapter = stirred(adapters.create(method, model, **options))
    adapter.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "options": without_point(config["options"])}))
    loaded = adapters.load(tmp_path, model)
    assert loaded.facts.state == "residual" or method == "live"
    with adapters.attach(model, adapter):
        expected = logits(model, batch)
    with adapters.attach(model, loaded):
        assert torch.equal(logits(model, batch), expected)
    if method == "live":
        today = stirred(adapters.create(method, model))
        with adapters.attach(model, today):
            assert not torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("method", [name for name in adapters.names() if "+" not in name])
@pytest.mark.parametrize(("teacher", "kind"), [(False, None), (True, "hidden"), ("logits", "logits")])
def test_any_method_can_have_any_teacher(method: str, teacher: Any, kind: str | None) -> None:
    options = methods.parse(method, {"teacher": teacher})
    facts = options.facts()
    assert facts.teacher == kind and facts.ground_truth_weight == (1.0 if kind is None else 0.5)
    assert methods.parse(method, options.plain()) == options
    if kind == "hidden" and method not in ("live", "mimic"):
        at = {point: methods.parse(method, {"teacher": True, "point": point}).facts().state for point in POINTS}
        assert at == dict(zip(POINTS, POINTS, strict=True))


def test_a_methods_own_teacher_is_no_part_of_its_options() -> None:
    for method, own in (("mimic", True), ("live", "logits")):
        assert methods.parse(method, {"teacher": own}).plain() == methods.parse(method, {}).plain()
        assert "teacher" not in methods.parse(method, {}).plain()
    for point in ("mlp", "residual"):
        assert methods.parse("live", {"teacher": True, "point": point}).facts().state == point
    plain = methods.parse("mimic", {"teacher": False, "alignment": "attention"}).plain()
    assert plain == methods.parse("mimic", {"teacher": False}).plain()
