"""A trial that goes on from its checkpoint equals one that was never interrupted, to the bit, on a CPU."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import InputError
from pipeline.core.files import Superseded, folder_digest
from pipeline.evaluate.answerer import Answerer
from pipeline.records.store import TrialFolder, TrialStore
from pipeline.train.loop import TrainingLoop
from pipeline.train.trial_run import TrialRun
from pipeline.train.workbench import Stopped, Workbench

EPOCHS = 3
TRIALS = {
    "dropout": ("lora", {"rank": 2, "dropout": 0.3}),
    "demonstrations drawn anew for every sample": ("live", {}),
    "a teacher": ("mimic", {}),
    "a start from demonstrations": ("ct-kv", {}),
    "what demonstrations gave and stays": ("i2cl", {}),
    "parameter groups with rates of their own": ("hificl", {"teacher": True}),
}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(device="cpu")


def whole_state(folder: Path) -> dict:
    """Losses by step, schedule and scores by epoch, digests of adapter, optimiser and the chosen epoch's adapter."""
    state = json.loads((folder / f"checkpoint/epoch-{EPOCHS:04d}/state.json").read_text())
    rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in state["rows"]]
    losses = TrialStore(folder.parent).trial(folder.name).losses()
    assert [row["train_loss"] for row in rows] == [pytest.approx(sum(one) / len(one)) for one in losses.values()]
    return {"rows": rows, "losses": losses, "best": state["best"], "files": state["files"],
            "adapter": json.loads((folder / "done.json").read_text())["adapter_digest"]}  # fmt: skip


def go_on(bench: Workbench, request, epochs: int) -> int:
    """Take a trial up and train some epochs; return those that it had behind it."""
    behind = bench.admit(request)
    for _ in range(epochs):
        bench.advance()
    bench.evict(request.key)
    return behind


@pytest.fixture(scope="module")
def undisturbed(bench, trial, tmp_path_factory):
    """`undisturbed(name)` gives the request of a trial that has been trained in one go."""

    @cache
    def trained(name):
        method, given = TRIALS[name]
        request = trial(method, tmp_path_factory.mktemp("whole"), epochs=EPOCHS, **given)
        assert go_on(bench, request, EPOCHS) == 0
        return request

    return trained


@pytest.mark.parametrize("name", TRIALS)
def test_a_resumed_trial_equals_an_undisturbed_one(bench, trial, undisturbed, tmp_path, name):
    method, given = TRIALS[name]
    whole, cut = undisturbed(name), trial(method, tmp_path / "cut", epochs=EPOCHS, **given)
    assert go_on(bench, cut, 1) == 0
    torch.manual_seed(99)  # another process, which has drawn other numbers
    torch.rand(1000)
    bench.loop.resident.targets.clear()
    assert go_on(bench, cut, 1) == 1
    newest = Path(cut.folder) / "checkpoint/epoch-0002"
    torn = max((p for p in newest.iterdir() if p.is_file() and p.name != "state.json"), key=lambda p: p.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-1])
    assert go_on(bench, cut, 2) == 1  # the generation before
    assert whole_state(Path(cut.folder)) == whole_state(Path(whole.folder))
    steps = -(-whole.config.num_train_samples // (whole.config.micro_batch_size * whole.config.accumulation))
    losses = whole_state(Path(whole.folder))["losses"]
    assert {epoch: len(one) for epoch, one in losses.items()} == dict.fromkeys(range(1, EPOCHS + 1), steps)


COUNT, KEEP = Workbench._count, TrainingLoop.keep


def stopped_behind(monkeypatch, step: int) -> Workbench:
    """A process that hears, once its trial has so many steps behind it, that it is to end."""
    bench = Workbench(device="cpu")

    def counted(self):
        self.stopping = self is bench and self.loop.trials[0].step >= step
        COUNT(self)

    monkeypatch.setattr(Workbench, "_count", counted)
    return bench


@pytest.mark.parametrize("name", ["dropout", "a teacher"])
def test_a_trial_that_is_stopped_within_an_epoch_goes_on_behind_its_last_step(
    bench, trial, undisturbed, tmp_path, monkeypatch, name
):
    """Of 5 steps an epoch; stopped within it, at its end, while it is scored, and in the next one."""
    method, given = TRIALS[name]
    whole, cut = undisturbed(name), trial(method, tmp_path / "cut", epochs=EPOCHS, **given)
    places = []
    for step in (3, 5, 5, 9):
        process = stopped_behind(monkeypatch, step)
        with pytest.raises(Stopped):
            go_on(process, cut, EPOCHS)
        process.loop.evict(cut.key)
        places.append(max(path.name for path in (Path(cut.folder) / "checkpoint").iterdir()))
        torch.manual_seed(99)
    ends = ["epoch-0000-step-000003", "epoch-0000-step-000005", "epoch-0000-step-000005", "epoch-0001-step-000004"]
    assert places == ends
    assert not (Path(cut.folder) / "done.json").exists()
    assert go_on(bench, cut, EPOCHS - 1) == 1
    assert whole_state(Path(cut.folder)) == whole_state(Path(whole.folder))
    assert sorted(path.name for path in (Path(cut.folder) / "checkpoint").iterdir()) == ["epoch-0002", "epoch-0003"]


@pytest.mark.parametrize("name", ["dropout", "a teacher"])
def test_a_trial_that_is_compared_within_an_epoch_goes_on_from_there_with_the_bits_of_one_that_is_not(
    bench, trial, undisturbed, tmp_path, monkeypatch, name
):
    """Of 5 steps an epoch after 2, where its process is also told to stop; after 5, an epoch's end; and after 8."""
    method, given = TRIALS[name]
    whole, cut = undisturbed(name), trial(method, tmp_path / "cut", epochs=EPOCHS, **given)
    cut = replace(cut, compared_after=(0.4, 1.0, 1.5, 3.0))
    process = stopped_behind(monkeypatch, 2)
    with pytest.raises(Stopped):
        go_on(process, cut, 1)
    process.loop.evict(cut.key)
    told, epochs, end = {}, [], None
    while end is None:
        bench.admit(cut)
        for _ in range(2):  # what it has behind it, then what is next
            for report in bench.advance():
                told |= {loss.after: loss for loss in report.compared}
                epochs += [report.epoch] if report.metrics else []
                end = report.end
            if end or not report.compared or len(report.compared) < len(told):
                break
        bench.evict(cut.key)
        torch.manual_seed(99)
    folder = TrialFolder(Path(cut.folder))
    assert epochs == [1, 2, 3] and list(told) == [0.4, 1.0, 1.5], "at its end nobody compares it"
    assert folder.compared() == list(told.values())
    assert [loss.step for loss in told.values()] == [2, 5, 8]
    assert whole_state(Path(cut.folder)) == whole_state(Path(whole.folder))
    if name == "dropout":  # without a teacher it is the training loss; a tenth of 5 steps is one
        losses = [loss for epoch in folder.losses().values() for loss in epoch]
        assert [loss.loss for loss in told.values()] == [losses[loss.step - 1] for loss in told.values()]


def test_a_trial_that_was_past_a_point_before_it_was_asked_for_says_so(bench, trial, tmp_path):
    request = trial("hificl", tmp_path, epochs=2)
    go_on(bench, request, 1)
    bench.admit(replace(request, compared_after=(0.4, 1.6)))
    (first,), (second,) = bench.advance(), bench.advance()
    bench.evict(request.key)
    assert [(loss.after, loss.loss is None) for loss in (*first.compared, *second.compared)] == [
        (0.4, True), (1.6, False),
    ]  # fmt: skip


def test_steps_are_kept_by_time_and_a_damaged_one_costs_its_epoch_alone(
    bench, trial, undisturbed, tmp_path, monkeypatch
):
    whole = undisturbed("dropout")
    often = replace(trial("lora", tmp_path / "often", epochs=EPOCHS, **TRIALS["dropout"][1]), keep_seconds=1e-9)
    process = stopped_behind(monkeypatch, 8)
    monkeypatch.setattr(TrainingLoop, "keep", lambda self, trials: KEEP(self, trials if not process.stopping else ()))
    with pytest.raises(Stopped):  # without a word: what is there is what was kept by time
        go_on(process, often, EPOCHS)
    kept = Path(often.folder) / "checkpoint"
    assert sorted(path.name for path in kept.iterdir()) == ["epoch-0001", "epoch-0001-step-000002"]
    process.loop.trials.clear()
    (kept / "epoch-0001-step-000002/so-far-rank0000.json").write_text("{}")
    assert go_on(bench, often, EPOCHS) == 1
    assert whole_state(Path(often.folder)) == whole_state(Path(whole.folder))


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process runs after it."""


class Renames:
    """What of a process's renames comes to pass: with each a file or folder is there, or another one."""

    def __init__(self, monkeypatch) -> None:
        self.count, self.stop_at, self.then, self.dead = 0, 0, None, False
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        for name in ("unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._alive(getattr(os, name)))

    def _alive(self, call):
        def made(*args, **kwargs):
            if self.dead:
                raise Killed
            return call(*args, **kwargs)

        return made

    def _counted(self, call):
        def made(*args, **kwargs):
            if self.dead:
                raise Killed
            self.count += 1
            if self.count == self.stop_at:
                then, self.then = self.then, None
                if then is None:
                    self.dead = True
                    raise Killed
                then()
            return call(*args, **kwargs)

        return made


@pytest.fixture
def rising(monkeypatch):
    """Every epoch is better than the one before, so every epoch's adapter is kept."""
    finish = TrialRun.finish_epoch

    def scored(self, selected, seconds):
        return finish(self, {**selected, "objective": float(self.epoch_number)}, seconds)

    monkeypatch.setattr(TrialRun, "finish_epoch", scored)


SHORT = {"rank": 2, "epochs": 2, "num_train_samples": 4, "num_selection_samples": 1}


def left(folder: Path) -> dict:
    """All that a trial leaves, but times."""
    end = TrialStore(folder.parent).done(folder.name)
    state = json.loads((folder / "checkpoint/epoch-0002/state.json").read_text())
    reports = [report.model_copy(update={"seconds": 0, "train_seconds": 0}) for report in TrialFolder(folder).epochs()]
    return {
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
        "state": state["files"], "reports": reports, "losses": TrialFolder(folder).losses(),
        "adapter": folder_digest(folder / "adapter"),
        "end": (end.status, end.epochs, end.chosen_epoch, end.adapter_digest),
    }  # fmt: skip


def test_killed_between_any_two_writes_a_trial_ends_with_the_same_bits(bench, trial, tmp_path, monkeypatch, rising):
    undisturbed = trial("lora", tmp_path / "undisturbed", **SHORT)
    with monkeypatch.context() as patched:
        renames = Renames(patched)
        go_on(bench, undisturbed, 2)
    wanted, number = left(Path(undisturbed.folder)), renames.count
    assert number >= 10 and wanted["end"][:3] == ("finished", 2, 2)
    for stop_at in range(1, number + 1):
        request = trial("lora", tmp_path / f"killed-{stop_at}", **SHORT)
        with monkeypatch.context() as patched:
            Renames(patched).stop_at = stop_at
            with pytest.raises(Killed):
                go_on(bench, request, 2)
        bench.loop.trials.clear()
        behind = bench.admit(request)
        while not bench.advance()[-1].end:
            pass
        assert left(Path(request.folder)) == wanted, (stop_at, behind)


def test_a_process_that_thaws_writes_nothing_into_a_trial_that_another_has_ended(trial, tmp_path, monkeypatch, rising):
    """Frozen before any of its renames, as a worker of another node is by a partition or a stalled NFS client."""
    frozen, other = Workbench(device="cpu"), Workbench(device="cpu")
    with monkeypatch.context() as patched:
        renames = Renames(patched)
        go_on(frozen, trial("lora", tmp_path / "count", **SHORT), 2)
    for stop_at in range(2, renames.count + 1):  # the first one takes the trial up
        request = trial("lora", tmp_path / f"frozen-{stop_at}", **SHORT)
        states = []

        def end_it(request=request, states=states):
            go_on(other, request, 2)
            states.append((left(Path(request.folder)), folder_digest(Path(request.folder))))

        with monkeypatch.context() as patched:
            renames = Renames(patched)
            renames.stop_at, renames.then = stop_at, end_it
            with pytest.raises(Superseded, match="another process has (just )?taken th"):
                go_on(frozen, request, 2)
        frozen.evict(request.key)
        assert states and states[0][0]["end"][:3] == ("finished", 2, 2)
        assert (left(Path(request.folder)), folder_digest(Path(request.folder))) == states[0], stop_at


@pytest.mark.parametrize("damage", ["bits", "another's"])
def test_an_adapter_that_is_not_the_one_of_the_training_is_scored_and_asked_by_nobody(bench, trial, tmp_path, damage):
    requests = [trial("lora", tmp_path, **{**SHORT, "epochs": 1, "seed": seed}) for seed in (0, 1)]
    for request in requests:
        go_on(bench, request, 1)
    one, other = (Path(request.folder) for request in requests)
    evaluation = EvaluationConfig(trial=one.name, num_samples=1, max_new_tokens=2)
    assert bench.score(requests[0], evaluation).num_samples == 1
    weights = one / "adapter/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "bits":
        for at in range(struct.unpack("<Q", data[:8])[0] + 11, len(data), 4):
            data[at] ^= 0x40  # one bit of each value's exponent: names and shapes stay
    else:
        data = (other / "adapter/adapter_model.safetensors").read_bytes()
    weights.write_bytes(data)
    for asked in (lambda: bench.score(requests[0], evaluation), lambda: Answerer(one / "adapter")):
        with pytest.raises(
            InputError, match="adapter: not the adapter that the training ended with.*damaged or exchanged"
        ):
            asked()
