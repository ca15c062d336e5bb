"""What is done to trials by hand: stopped, let go on, changed, trained on; and the ledger of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.load import TrialRequest, load
from pipeline.core.errors import InputError
from pipeline.records.store import TrialStore
from pipeline.records.trial import Act, TrialEnd, TrialReport
from pipeline.sweep import leases, recorded
from pipeline.train.trial_run import cosine_with_warmup
from pipeline.train.workbench import Workbench
from tests.conftest import ROOT
from tests.sweep.conftest import SHORT, worked


def store_of(plan) -> TrialStore:
    return TrialStore(plan.places.runs)


def test_a_trial_stopped_by_hand_waits_until_it_may_go_on_and_ends_with_the_bits_of_one_that_was_not(plan):
    store, (first, second) = store_of(plan), plan.trials
    for key in plan.trials:
        store.open(plan.trials[key])
    recorded.stop(store, first, 1)
    recorded.stop(store, second)
    assert not store.halted(first) and store.halted(second)  # the one may train an epoch, the other none
    worked(plan)
    end = store.done(first)
    assert (end.status, end.epochs, end.exact, len(store.epochs(first))) == ("stopped", 1, True, 1)
    assert store.done(second) is None and store.halted(first) and not plan.open_keys(store.settled)
    assert leases.open_again(plan, store) == []
    recorded.resume(store, first)
    assert leases.open_again(plan, store) == [first]
    worked(plan)
    assert store.done(first).status == "finished" and [act.act for act in store.acts(first)] == ["stop", "resume"]
    other = TrialStore(plan.places.runs.parent / "undisturbed")
    trained(Workbench("cpu"), replace(plan.request_of(plan.trials[first]), folder=str(other.folder(first))))
    assert store.done(first).adapter_digest == other.done(first).adapter_digest is not None


def test_a_ledger_keeps_what_was_said_and_an_end_is_nobodys_to_stop(tmp_path, trial):
    store = TrialStore(tmp_path / "runs")
    key = trial("lora", tmp_path, **SHORT).config.key
    with pytest.raises(InputError, match="no such trial"):
        recorded.full_key(store, key[:6])
    store.open(trial("lora", tmp_path, **SHORT).config)
    assert recorded.full_key(store, key[:6]) == key
    with pytest.raises(InputError, match="was not stopped by hand"):
        recorded.resume(store, key)
    recorded.stop(store, key, 2)
    assert [(act.trial, act.told) for act in store.acts()] == [(key, "stopped after epoch 2")]
    with (store.root / "acts.jsonl").open("a") as file:
        file.write('{"act": "sto')  # a crash in the middle of a line
    assert recorded.resume(store, key).told == "may go on" and len(store.acts(key)) == 2
    store.finish(key, TrialEnd(status="finished", epochs=2))
    with pytest.raises(InputError, match="has ended: finished"):
        recorded.stop(store, key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rnak": 3}, "no setting 'rnak' to change.*rank"),
        ({"rank": 0}, "rank"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"alignment_weight": 0.5}, "another teacher"),
        ({"teacher": True}, "another teacher"),
        ({"num_train_samples": 9}, "no setting 'num_train_samples'"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_change_that_there_cannot_be_is_refused_by_name(trial, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        recorded.changed(trial("hificl", tmp_path, **SHORT).config, changes)


def test_a_changed_trial_is_the_other_but_for_the_changes(trial, tmp_path):
    config = trial("hificl", tmp_path, **SHORT).config
    child = recorded.changed(config, {"rank": 3, "learning_rate": 0.5, "seed": 7})
    assert (child.options["rank"], child.learning_rate, child.seed) == (3, 0.5, 7)
    back = recorded.changed(child, {"rank": 2, "learning_rate": config.learning_rate, "seed": config.seed})
    assert back.key == config.key


def trained(bench: Workbench, request: TrialRequest) -> list[TrialReport]:
    bench.admit(request)
    reports: list[TrialReport] = []
    while not reports or reports[-1].end is None:
        reports += bench.advance()
    return reports


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("method", ["hificl", "mimic"])
def test_an_extension_has_its_parents_epochs_and_goes_on_by_its_own_schedule(trial, tmp_path, method):
    bench, short, long = Workbench("cpu"), {**SHORT, "num_shots": 1}, {**SHORT, "num_shots": 1, "epochs": 4}
    if method == "mimic":  # which has no rank
        del short["rank"], long["rank"]
    parent = trial(method, tmp_path / "runs", **short)
    child = trial(method, tmp_path / "runs", **long, parent=parent.config.key)
    assert child.config.key not in (parent.config.key, trial(method, tmp_path / "runs", **long).config.key)
    with pytest.raises(InputError, match="no checkpoint to go on from"):
        bench.admit(child)
    assert [report.epoch for request in (parent, child) for report in trained(bench, request)] == [1, 2, 3, 4]
    old, new = (TrialStore(tmp_path / "runs").trial(request.key) for request in (parent, child))
    assert rows(new.path)[:2] == rows(old.path) and list(new.losses()) == [1, 2, 3, 4]
    assert new.losses()[1] == old.losses()[1] and new.end().epochs == 4 and new.end().exact
    per_epoch = len(new.losses()[1])
    last = cosine_with_warmup(4 * per_epoch - 1, 4 * per_epoch, child.config.warmup_ratio)
    assert new.epochs()[-1].learning_rate == pytest.approx(child.config.learning_rate * last)


def test_the_study_of_what_was_made_by_hand_holds_each_trial_once(tmp_path, trial, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = load(ROOT / "params.yaml")
    config = trial("hificl", tmp_path, **SHORT).config
    store = TrialStore(tmp_path / "runs")
    store.open(config)
    act = recorded.clone(tmp_path, params, config.key, {"rank": 3})
    assert (act.parent, act.changes, act.told) == (config.key, {"rank": 3}, f"a clone of {config.key} with rank 3")
    assert store.config(act.trial).options["rank"] == 3 and store.done(act.trial) is None
    with pytest.raises(InputError, match="as it stands"):
        recorded.clone(tmp_path, params, config.key, {"rank": 3})
    with pytest.raises(InputError, match="no last epoch to go on from: open"):
        recorded.extend(tmp_path, params, config.key, 5)
    store.finish(config.key, TrialEnd(status="finished", epochs=2))
    with pytest.raises(InputError, match="last checkpoint is gone"):
        recorded.extend(tmp_path, params, config.key, 5)
    with pytest.raises(InputError, match="the trial has 2"):
        recorded.extend(tmp_path, params, config.key, 2)
    for name in ("params.yaml", "profiles", *(f"studies/{file.name}" for file in (ROOT / "studies").glob("*.yaml"))):
        if not (tmp_path / name).exists():  # what stands here was made by hand
            (tmp_path / name).symlink_to(ROOT / name)
    study = load(tmp_path / "params.yaml").studies["by-hand"]
    assert [row.trial.key for row in study.methods.values()] == [act.trial]
    assert [(act.act, act.trial) for act in store.acts()] == [("clone", act.trial)]
    assert Act.parse(store.acts()[0].text(), "", "") == store.acts()[0]
