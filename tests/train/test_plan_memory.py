"""What is counted on meta tensors is what a card would hold: sizes known by hand, other depths, declared cards."""

from __future__ import annotations

import pytest
import torch

from pipeline import backbones
from pipeline.backbones.passes import FILL
from pipeline.commands.plan import study_memory
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.train.counting import CARDS, CONTEXT, GIB, MOST_ROWS, BackboneMemory, MemoryOf, StepMemory, _Living
from tests.conftest import ROOT


def config(method: str, **given) -> TrialConfig:
    base = {"backbone": "b", "backbone_digest": "", "task": "t", "manifest_digest": "", "micro_batch_size": 2}
    return TrialConfig(**base, method=method, num_shots=8, **given)


@pytest.fixture(scope="module")
def llava() -> MemoryOf:
    return MemoryOf("llava-interleave-7b", "bf16")


@pytest.fixture(scope="module")
def hificl(llava) -> StepMemory:
    """A step of HiFICL, with which others are compared."""
    return llava.step(config("hificl"))


def test_storages_count_while_they_live():
    model = torch.nn.Linear(1024, 1024, device="meta")
    with _Living(model) as living:
        x = model(torch.empty(256, 1024, device="meta"))  # 1 MiB in, 1 MiB out
        assert living.now == living.peak == 2 << 20
        x = x.view(-1)[:10].detach()  # of the same storage; what went in is gone
        assert living.now == 1 << 20
        del x
        assert living.now == 0 and living.peak == 2 << 20


def test_weights_and_a_step_at_full_size(llava, hificl):
    assert llava.weights == 2 * backbones.get("llava-interleave-7b").parameters
    step = hificl
    assert step.step / GIB == pytest.approx(6.1, abs=0.3)  # B = 2, T = 755; docs/gpu.md
    assert step.checkpointed < 0.15 * step.step and step.teacher == 0
    mimic = llava.step(config("mimic"))
    assert step.step < mimic.step < 1.6 * step.step  # its fp32 differences would make it 1.8
    assert mimic.checkpointed < 0.25 * mimic.step and GIB < mimic.teacher < 2 * GIB


@pytest.mark.parametrize("method", ["prefix", "prompt", "bottleneck", "m2iv", "i2cl", "peft"])
def test_a_baselines_step_is_counted(llava, hificl, method):
    step = llava.step(config(method))
    assert 0.9 * hificl.step < step.step < 3 * hificl.step and step.checkpointed < step.step
    assert (step.teacher > 0) == (method in ("m2iv", "i2cl"))


def test_what_a_card_took_is_what_is_counted():
    """Peaks in GiB of an H200 with random Idefics2-8b in bf16, B = 2: packs of HiFICL, and a step of LoRA."""
    counter = MemoryOf("idefics2-8b-base", "bf16")
    step = counter.step(config("hificl")).step
    for trials, peak in {1: 16.55, 2: 17.39, 4: 19.06, 8: 22.35, 64: 67.66}.items():
        assert (counter.weights + trials * step) / GIB == pytest.approx(peak, rel=0.03), trials
    lora = counter.step(config("lora", options={"dropout": 0.0})).step  # whose vision tower learns too
    assert (counter.weights + lora) / GIB == pytest.approx(20.82, rel=0.1)


def test_two_depths_tell_a_third(llava, monkeypatch):
    monkeypatch.setattr(llava, "layers", 8)
    drawn_out = llava.step(config("live")).step
    monkeypatch.setattr(llava, "depths", (8, 9))
    assert llava.step(config("live")).step == pytest.approx(drawn_out, rel=1e-3)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("shots", [0, 8])
def test_batches_that_answer_fill_declared_cards_and_no_more(llava, card, shots):
    of = BackboneMemory("llava-interleave-7b", "bf16", "none", llava.weights, [], {shots: llava.answer(shots)})
    rows, tokens, free = of.rows(card, shots), llava.turn * (shots + 1), card * GIB - CONTEXT - llava.weights
    assert 1 <= rows <= MOST_ROWS
    peak = llava.prefill(rows, tokens)
    assert peak <= FILL * free
    if rows < MOST_ROWS:  # neither far from what fits
        assert peak > 0.8 * FILL * free * rows / (rows + 1)


def test_a_card_holds_a_teachers_pass_or_a_step_and_packs_of_steps():
    of = BackboneMemory("b", "bf16", "none", 15 * GIB, [], {})
    step = StepMemory("mimic", 2, step=7 * GIB, checkpointed=GIB, teacher=2 * GIB)
    assert [step.trials(of.room(card)) for card in (16, 24, 32, 48, 80)] == [0, 0, 1, 3, 8]
    assert [step.trials(of.room(card), again=True) for card in (16, 24)] == [0, 6]
    long = StepMemory("mimic", 2, step=7 * GIB, checkpointed=GIB, teacher=30 * GIB)
    assert [long.trials(of.room(card), again=True) for card in (24, 80)] == [0, 8]


def test_what_the_page_shows_of_a_decoder_in_4_bits_is_what_is_counted():
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    given = "studies.own={title: o, backbones: [idefics2-8b-base, llava-interleave-7b], tasks: [okvqa], methods: "
    given = [given + "{hificl: {}}}", "train.precision=fp16", "train.quantize=nf4"]
    plan = study_memory("own", cards=[16, 24], overrides=given)
    shown = list(plan.shown())
    for line in (part for part in shown if isinstance(part, str) and "its decoder in nf4" in part):
        assert line in page
    for table in (part for part in shown if hasattr(part, "columns")):
        (row, *_) = zip(*(column.cells for column in table.columns), strict=True)
        assert row[0] == "hificl, 2 rows" and " ".join(filter(None, row)) in " ".join(page.split())
    assert [of["quantize"] for of in plan.record()["backbones"]] == ["nf4", "nf4"]


@pytest.mark.parametrize(("kind", "weights", "beside"), [("int8", 9.17, 0.88), ("nf4", 6.02, 0.90)])
def test_what_a_card_took_in_few_bits_is_what_is_counted(kind, weights, beside):
    """GiB of an H200: random Idefics2-8b, its weights and a HiFICL step's peak beside them, B = 2 (docs/gpu.md)."""
    counter = MemoryOf("idefics2-8b-base", "bf16", kind)
    assert counter.weights / GIB == pytest.approx(weights, rel=0.005)
    assert counter.step(config("hificl")).step / GIB == pytest.approx(beside, rel=0.03)


def test_few_bits_leave_room_for_trials_and_each_product_makes_its_weight(llava, hificl):
    wide = MemoryOf("llava-interleave-7b", "bf16", "int8")
    few = wide.step(config("hificl"))
    assert few.step - hificl.step == wide.passing == 2 * 4096 * 11008
    assert 0.55 < wide.weights / llava.weights < 0.65  # embeddings, output and the tower are as they were


def test_the_plan_says_it_by_card():
    given = "studies.own={title: o, backbones: [llava-interleave-7b], tasks: [okvqa], methods: {hificl: {}, "
    given += "icl-8: {method: icl-k, num_shots: 8}, task-vector: {num_shots: 4}}}"
    plan = study_memory("own", cards=[24, 80], overrides=[given, "train.precision=bf16"])
    (of,) = plan.record()["backbones"]
    (hificl,) = of["methods"]
    assert (of["precision"], hificl["method"], hificl["micro_batch_size"]) == ("bf16", "hificl", 2)
    assert hificl["cards"] == {"24": {"trials": 0, "checkpointed": 8}, "80": {"trials": 8, "checkpointed": 8}}
    assert of["rows_answered_at_once"] == {"24": {"0 shots": 15, "8 shots": 1}, "80": {"0 shots": 64, "8 shots": 13}}
    (shown,) = [table for table in plan.shown() if hasattr(table, "columns")]
    rows = list(zip(*(column.cells for column in shown.columns), strict=True))
    assert ("hificl, 2 rows", "6.1", "0.7", "", "8 c.", "8") in rows
    with pytest.raises(InputError, match="a card of 0 GiB holds nothing. Give its GiB"):
        study_memory("own", cards=[0], overrides=[given])
