"""Memory that runs out, wherever it does, and memory that is given back: on a CPU, with a card's errors."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups

from pipeline import adapters, backbones
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.passes import FILL, Passes, bytes_of_row, is_out_of_memory
from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import WorkError
from pipeline.evaluate.answerer import Answerer
from pipeline.train import loss
from pipeline.train.cost import Capacity
from pipeline.train.workbench import Workbench
from tests.support.free_port import free_port


@pytest.fixture(scope="module")
def one_rank():
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    groups._WORLD_GROUP = None  # DeepSpeed remembers the group of another file's tests in this process
    yield
    dist.destroy_process_group()
    groups._WORLD_GROUP = None


class Card:
    """A model whose passes run out of memory beyond `rows` rows; `errors` counts how often they did."""

    def __init__(self, loaded, monkeypatch) -> None:
        self.rows, self.errors, self.stripped = 10**9, 0, loaded.model.model.forward
        encode = loaded.family.encode_images
        monkeypatch.setattr(loaded.model.model, "forward", self.forward, raising=False)
        monkeypatch.setattr(
            loaded.family, "encode_images", lambda model, blocks: self.fits(blocks) or encode(model, blocks)
        )

    def fits(self, rows) -> None:
        if len(rows) > self.rows:
            self.errors += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, *args, **kwargs):
        self.fits(kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"])
        return self.stripped(*args, **kwargs)


@pytest.mark.parametrize(("engine", "stage", "metric"), [("torch", 0, "score"), ("deepspeed", 2, "loss")])
def test_memory_that_runs_out_anywhere_costs_no_number_and_is_remembered(
    one_rank, trial, tmp_path, monkeypatch, engine, stage, metric
):
    bench = Workbench(device="cpu")
    monkeypatch.setattr("pipeline.backbones.passes.free_bytes", lambda device: 1 << 40)  # as on a card, with room
    given = {
        "engine": engine, "zero_stage": stage, "epochs": 1, "num_train_samples": 8, "micro_batch_size": 4,
        "selection_metric": metric,
    }  # fmt: skip
    card = None

    def numbers(name: str, rows: int):
        request = trial("mimic", tmp_path / name, **given)
        resident = bench.resident(request)
        resident.targets.clear()
        resident.visual._memory.clear()
        nonlocal card
        card = card or Card(resident.loaded, monkeypatch)
        card.rows, card.errors = rows, 0
        bench.admit(request)
        (report,) = bench.advance()
        evaluation = EvaluationConfig(trial=request.key, num_samples=4)
        (answers,) = bench.answer([request], evaluation)
        selected = report.metrics.selection_score if metric == "score" else report.metrics.selection_loss
        return report, selected, answers.texts

    whole, selected, texts = numbers("whole", 10**9)
    assert card.errors == 0 and bench.resident(trial("mimic", tmp_path, **given)).loaded.passes.most == {}
    cut, selected_cut, texts_cut = numbers("cut", 1)
    assert card.errors > 0
    assert cut.metrics.train_loss == pytest.approx(whole.metrics.train_loss, abs=1e-5)
    assert selected_cut == pytest.approx(selected, abs=1e-5) and texts_cut == texts
    assert cut.end == "finished" and len(texts) == 4
    most = bench.loop.passes.most
    assert most["training"] == most["the vision tower"] == 1
    assert {"a teacher's pass", "generation"} < most.keys() and ("selection" in most) == (metric == "loss")
    numbers("again", 1)
    assert card.errors == 0  # the sizes that fit are known


def test_a_sample_that_does_not_fit_alone_is_an_error_in_one_line(trial, tmp_path, monkeypatch):
    bench, request = Workbench(device="cpu"), trial("hificl", tmp_path)
    Card(bench.resident(request).loaded, monkeypatch).rows = 0
    with pytest.raises(WorkError, match=r"one sample alone does not fit the memory, in .*hificl plan --memory") as said:
        bench.admit(request)
        bench.advance()
    assert "\n" not in str(said.value)


def test_another_error_is_no_lack_of_memory():
    def broken(rows):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        Passes().run("generation", [1, 2], broken)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))


def test_passes_hold_what_is_free_and_are_of_one_size(monkeypatch):
    sizes = []
    monkeypatch.setattr("pipeline.backbones.passes.free_bytes", lambda device: int(1001 / FILL))
    rows = [10] * 25 + [5] * 25

    def work(chunk):
        sizes.append(len(chunk))
        return chunk

    done = Passes().run(
        "generation", rows, work, width=lambda row: row, device=torch.device("cpu"), bytes_of=lambda tokens: 10 * tokens
    )
    assert done == rows and sizes == [10, 10, 10, 20]


def test_another_backbone_is_loaded_once_the_first_is_gone(trial, tmp_path, monkeypatch):
    first, second = (trial("hificl", tmp_path, precision=precision, epochs=1) for precision in ("fp32", "bf16"))
    load, alive = backbones.load_from, []

    def loading(*args, **kwargs):
        alive.append([name for name, held in models.items() if held() is not None])
        made = load(*args, **kwargs)
        models[kwargs["dtype"]] = weakref.ref(made.model)
        return made

    models: dict = {}
    monkeypatch.setattr(backbones, "load_from", loading)
    for use in ("trains", "answers"):
        bench = Workbench(device="cpu")
        models.clear()
        alive.clear()
        for request in (first, second, first):
            if use == "trains":
                bench.admit(request)
                while bench.advance():
                    pass
            else:
                bench.answer([request], EvaluationConfig(trial=request.key, num_samples=2))
        assert alive == [[], [], []], use
        del bench
        gc.collect()


def test_a_backbone_in_training_is_not_taken_away(trial, tmp_path):
    first, second = (trial("hificl", tmp_path, precision=precision) for precision in ("fp32", "bf16"))
    bench = Workbench(device="cpu")
    bench.admit(first)
    with pytest.raises(WorkError, match="another backbone is in training here"):
        bench.admit(second)
    assert bench.loop.trials[0].config == first.config


def test_an_adapter_answers_in_the_precision_that_was_scored(trial, tmp_path, monkeypatch):
    request = trial("hificl", tmp_path, precision="bf16", epochs=1, num_train_samples=4)
    bench = Workbench(device="cpu")
    bench.admit(request)
    bench.advance()
    answerer = Answerer(tmp_path / request.key / "adapter")
    assert answerer.origin["precision"] == "bf16"
    assert answerer._loaded[0].dtype == torch.bfloat16


class Counters:
    """What torch counts of a card's memory: a selection takes 60 GiB, a pack of n trials 16 + 2 n."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.peak = 16 << 30
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device=None: 76 << 30)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        total = type("Properties", (), {"total_memory": 80 << 30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: total)

    def reset(self, device=None) -> None:
        self.peak = self.now

    def take(self, gib: int) -> None:
        self.peak = max(self.peak, self.now + (gib << 30))


def test_a_packs_room_is_not_what_selection_took(monkeypatch):
    counters, capacity = Counters(monkeypatch), Capacity("cuda")
    for trials in (1, 2, 4):
        assert capacity.best() == trials
        capacity.begin()
        counters.take(2 * trials)
        capacity.note(trials, 100 * trials, 1.0, 10)
        counters.take(60)  # selection
    assert capacity.best() == 8


def test_a_card_too_small_for_a_larger_pack_ends_its_growth(monkeypatch):
    counters, capacity = Counters(monkeypatch), Capacity("cuda")
    for trials in (1, 2, 4):
        capacity.begin()
        counters.take(12 * trials)  # 8 would take 16 + 96 of 80 GiB
        capacity.note(trials, 100 * trials, 1.0, 10)
    assert capacity.best() == 4


CHECKPOINTED = [
    ("hificl", "fp32", {}), ("live", "bf16", {}), ("mimic", "bf16", {}), ("lora", "fp32", {"dropout": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "precision", "given"), CHECKPOINTED)
def test_gradient_checkpointing_changes_no_number_and_keeps_less(
    trial, tmp_path, monkeypatch, method, given, precision
):
    kept: dict[bool, list[int]] = {False: [], True: []}
    losses = {}
    for again in (False, True):
        bench = Workbench(device="cpu")
        fields = {"epochs": 1, "num_train_samples": 8, "precision": precision, "selection_metric": "loss", **given}
        request = trial(method, tmp_path / str(again), gradient_checkpointing=again, **fields)
        bench.admit(request)
        plain = bench.loop.losses

        def counted(pack, chunk, plain=plain, sizes=kept[again]):
            held = {}
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: held.setdefault(tensor.untyped_storage().data_ptr(), tensor.nbytes) and tensor,
                lambda x: x,
            )
            with hooks:
                made = plain(pack, chunk)
            sizes.append(sum(held.values()))
            return made

        monkeypatch.setattr(bench.loop, "losses", counted)
        (report,) = bench.advance()
        losses[again] = report.metrics.train_loss, report.metrics.selection_loss, report.metrics.gradient_norm
    assert losses[True] == losses[False]
    assert max(kept[True]) < 0.7 * max(kept[False])


def test_long_rows_states_are_compared_in_groups_of_layers(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(7, 16, generator=generator, dtype=torch.bfloat16).requires_grad_() for _ in range(5)]
    targets = [torch.randn(5, m, 16, generator=generator, dtype=torch.bfloat16) for m in (4, 3)]
    found = {}
    for most in (1 << 20, 2 * 4 * 7 * 16):  # all layers, and two at once
        monkeypatch.setattr(loss, "ALIGNED_BYTES", most)
        values = loss.alignment(states, targets)
        found[most] = values.detach(), torch.autograd.grad(values.sum(), states)
    (whole, grads), (parts, others) = found.values()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(others, grads, rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def benches() -> dict[str, Workbench]:
    """One for each precision, whose backbone is read once."""
    return {precision: Workbench(device="cpu") for precision in ("fp32", "bf16")}


@pytest.mark.parametrize("method", adapters.names())
def test_a_trial_in_bf16_loses_what_it_loses_in_fp32(benches, trial, tmp_path, method):
    losses, answered = {}, {}
    for precision, bench in benches.items():
        request = trial(method, tmp_path, precision=precision, epochs=1)
        bench.admit(request)
        (report,) = bench.advance()
        losses[precision] = report.metrics.train_loss
        (answered[precision],) = bench.answer([request], EvaluationConfig(trial=request.key, num_samples=4))
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert answered["bf16"].texts.keys() == answered["fp32"].texts.keys()


@pytest.mark.parametrize("name", backbones.names())
def test_what_a_row_takes_is_told_of_every_backbone(name, tiny):
    model, size = tiny(name).model, 4
    spec = decoder_of(model)
    a_token = 2 * spec.num_attentions * spec.num_kv_heads * spec.head_dim * size  # its key and value
    assert bytes_of_row(model, 100, new=10) - bytes_of_row(model, 100, new=10, caches=0) == 110 * a_token
    assert bytes_of_row(model, 100, new=10, beams=3) == 3 * bytes_of_row(model, 100, new=10)
