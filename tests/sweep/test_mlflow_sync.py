"""MLflow is brought in line with the trial store: live, at a start, and after the store was away."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import WorkError
from pipeline.records.evaluation import Evaluation, Measurement
from pipeline.records.store import TrialStore
from pipeline.records.trial import EpochReport, TrialEnd
from pipeline.sweep.mlflow_sync import MlflowSync
from pipeline.tracking import store as place
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import FINISHED, KILLED, TrialRunStart
from tests.support.free_port import free_port
from tests.support.plans import make_plan
from tests.tracking.conftest import ask

EPOCHS = 2
STEPS_TWICE = "select key, step from metrics group by run_uuid, key, step having count(*) > 1"


@pytest.fixture(scope="module", autouse=True)
def tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make a store whose tables exist, once: they take seconds."""
    Project.tables = tmp_path_factory.mktemp("tables") / "mlflow.db"
    Tracker(f"sqlite:///{Project.tables}", Project.tables.parent).prepare([])


def report(epoch: int) -> EpochReport:
    return EpochReport(epoch=epoch, train_loss=1 / 3)


class Project:
    """A folder with a trial store of trials that are not begun, and an MLflow store."""

    tables: Path

    def __init__(self, folder: Path, trials: int, uri: str | None = None) -> None:
        self.folder, self.uri = folder, uri or f"sqlite:///{folder / 'mlflow.db'}"
        self.empty_store()
        self.plan = make_plan(folder, trials)
        self.keys = list(self.plan.trials)
        self.store = TrialStore(self.plan.places.runs)
        for config in self.plan.trials.values():
            self.store.open(config)

    def empty_store(self) -> None:
        file = self.folder / "mlflow.db"
        with closing(sqlite3.connect(self.tables)) as tables, closing(sqlite3.connect(file)) as own:
            tables.backup(own)

    def sync(self) -> MlflowSync:
        """As a process that starts has it."""
        tracker = Tracker(self.uri, self.folder)
        sync = MlflowSync(tracker, self.store, self.plan, ["study"])
        sync.parents["study"] = tracker.open_sweep("study", tags={"sweep_key": "k"}, description="")
        return sync

    def train(self, key: str, epochs: int, status: str | None = None) -> None:
        """Write what a worker has written by then."""
        folder = self.store.trial(key)
        folder.write_epochs([report(epoch) for epoch in range(1, epochs + 1)])
        for epoch in range(1, epochs + 1):
            folder.add_losses(epoch, [1 / 3] * 50)
        if status:
            folder.adapter.mkdir(exist_ok=True)
            (folder.adapter / "adapter_config.json").write_text("{}")
            self.store.finish(key, TrialEnd(status=status, epochs=epochs))

    def logged(self, key: str) -> list[int]:
        """The epochs that MLflow has of a trial, in the order in which they came."""
        query = ("select m.step from metrics m join tags t using (run_uuid) where m.key = 'train_loss' and "
                 f"t.key = 'trial_key' and t.value = '{key}' order by m.rowid")  # fmt: skip
        return [step for (step,) in ask(self.folder, query)]

    def in_line(self, status: str = FINISHED) -> None:
        """Check that MLflow has all of every trial, once."""
        runs = Tracker(self.uri, self.folder).runs_of(set(self.keys))
        assert {key: [run.status for run in every] for key, every in runs.items()} == {
            key: [status] for key in self.keys
        }
        for key, (run,) in runs.items():
            assert self.logged(key) == list(range(1, EPOCHS + 1))
            assert run.tags["adapter_digest"] == self.store.done(key).adapter_digest
            assert run.params["seed"] and run.metric_steps["step/train_loss"] == 50 * EPOCHS
        assert ask(self.folder, STEPS_TWICE) == []
        models = ask(self.folder, "select count(*) from logged_models where status = 2")  # ready
        assert models == [(len(self.keys),)]


class Away:
    """Makes an MLflow store unreachable, from a call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.left, self.done = monkeypatch, 0, 0

    def after(self, calls: int, *, carried_out: bool = False) -> None:
        """Let so many calls pass; the one that fails is carried out all the same if `carried_out`."""
        from mlflow.tracking import MlflowClient

        self.left = calls
        real = {name: getattr(MlflowClient, name) for name in CALLS}

        def call(name: str):
            def wrapped(client, *args, **kwargs):
                if self.left <= 0:
                    if carried_out and self.left == 0:
                        real[name](client, *args, **kwargs)
                    self.left -= 1
                    raise ConnectionError("the store is gone")
                self.left -= 1
                return real[name](client, *args, **kwargs)

            return wrapped

        for name in CALLS:
            self.patch.setattr(MlflowClient, name, call(name))
        self.patch.setattr(place, "probe", self._probe)

    def _probe(self, uri: str) -> None:
        raise place.Unreachable("the MLflow store cannot be reached", where=uri)

    def back(self) -> None:
        self.patch.undo()


CALLS = (
    "create_run", "log_batch", "log_inputs", "log_dict", "log_artifact", "log_artifacts", "create_logged_model",
    "log_model_artifacts", "finalize_logged_model", "log_outputs", "set_terminated", "get_run",
    "search_logged_models",
)  # fmt: skip


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch):
    with pytest.MonkeyPatch.context() as patch:
        yield Away(patch)


def test_an_epoch_comes_with_its_report_and_none_twice_after_a_kill(tmp_path: Path) -> None:
    project = Project(tmp_path, 1)
    (key,) = project.keys
    first = project.sync()
    for epoch in (1, 2):
        project.train(key, epoch)
        if epoch == 1:
            first.on_report(key, report(1))
            assert project.logged(key) == [1]
    project.train(key, EPOCHS, "finished")  # and the process that logged is killed
    again = project.sync()
    for epoch in (1, 2):
        again.on_report(key, report(epoch))
    again.on_end(key, None)
    project.in_line()
    run = again.tracker.read_run(again.tracker.find_run(key) or "")
    ledger = (again.tracker.read_artifact(run.run_id, "ledger/metrics.jsonl") or "").splitlines()
    assert EpochReport.parse(ledger[-1], "the ledger", "") == report(EPOCHS)
    assert run.metrics == {"train_loss": 0.333333, "step/train_loss": 0.333333}


def test_what_mlflow_has_is_passed_over_and_what_it_lacks_is_mended(tmp_path: Path) -> None:
    project = Project(tmp_path, 4)
    whole, stopped, killed, missing = project.keys
    for key in project.keys:
        project.train(key, EPOCHS, "finished")
    sync = project.sync()
    project.store.finish(stopped, TrialEnd(status="stopped", epochs=EPOCHS))
    sync.record_done({whole, stopped})
    sync.tracker.close(sync._run(killed), KILLED)  # a crash between the trial's end and its run's
    again = project.sync()
    again.record_done(set(project.keys))
    assert set(again._runs) == {stopped, killed, missing}
    runs = again.tracker.ended_trials("study", again.parents["study"])
    assert {key: run.status for key, run in runs.items()} == {
        whole: FINISHED, stopped: KILLED, killed: FINISHED, missing: FINISHED,
    }  # fmt: skip
    assert project.logged(killed) == [1, 2]


def test_where_slots_wait_for_work_what_is_done_is_compared_before_what_is_heard_next(tmp_path: Path) -> None:
    project = Project(tmp_path, 3)
    *done, begun = project.keys
    for key in done:
        project.train(key, EPOCHS, "finished")
    sync = project.sync()
    sync.record_done(done, later=True)
    assert not sync.tracker.ended_trials("study", sync.parents["study"])
    project.train(begun, 1, None)
    sync.on_start(begun)
    runs = sync.tracker.ended_trials("study", sync.parents["study"])
    assert {key: run.status for key, run in runs.items()} == dict.fromkeys(done, FINISHED)
    again = project.sync()
    again.record_done([], later=True)
    again.record_done(done, later=True)
    again.settle(60.0)
    assert not again._lacking and not again._runs


@pytest.mark.parametrize(
    ("calls", "carried_out"),
    [(0, True), (3, False), (6, True), (9, True), (12, False), (14, True), (16, True), (18, True), (21, True)],
)
def test_a_store_that_goes_away_at_any_call_is_brought_in_line(tmp_path, away, calls, carried_out):
    project = Project(tmp_path, 2)
    sync = project.sync()
    away.after(calls, carried_out=carried_out)
    for epoch in range(1, EPOCHS + 1):
        for key in project.keys:
            sync.on_start(key)
            project.train(key, epoch, "finished" if epoch == EPOCHS else None)
            sync.on_report(key, report(epoch))
    for key in project.keys:
        sync.on_end(key, None)
    sync.close_sweeps(failed=False)
    with pytest.raises(WorkError) as caught:
        sync.settle(0)
    assert str(project.store.root) in str(caught.value) and project.uri in str(caught.value)
    away.back()
    sync.settle(0)
    project.in_line()
    parent = sync.tracker.read_run(sync.parents["study"])
    assert parent.status == FINISHED


@pytest.mark.parametrize("calls", [1, 6, 11, 15])
def test_a_crash_while_the_store_is_away_is_mended_by_the_next_start(tmp_path, away, calls):
    project = Project(tmp_path, 2)
    sync = project.sync()
    away.after(calls, carried_out=True)
    for key in project.keys:
        project.train(key, EPOCHS, "finished")
        sync.on_report(key, report(EPOCHS))
    del sync  # with all that it remembered
    away.back()
    again = project.sync()
    again.record_done(set(project.keys))
    project.in_line()


def test_training_waits_for_nothing_and_each_cause_is_said_once(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("pipeline.sweep.mlflow_sync.say", said.append)
    project = Project(tmp_path, 3, uri=f"http://127.0.0.1:{free_port()}")
    sync = MlflowSync(Tracker(project.uri, tmp_path), project.store, project.plan, ["study"])
    sync.parents["study"] = "of a server that went away"
    started = time.monotonic()
    for key in project.keys:
        project.train(key, EPOCHS, "finished")
        sync.on_start(key)
        sync.on_report(key, report(EPOCHS))
        sync.on_end(key, None)
    assert time.monotonic() - started < 30
    assert len(said) == 1 and "away" in said[0]
    with pytest.raises(WorkError) as caught:
        sync.settle(0)
    assert project.uri in str(caught.value) and "3 runs" in str(caught.value)


def test_what_another_machine_has_just_written_is_waited_for(tmp_path: Path) -> None:
    """As on a shared file system, of which a machine may know for half a minute that a file is not there."""
    project = Project(tmp_path, 3)
    sync = project.sync()
    for key in project.keys:
        sync.on_start(key)
        project.train(key, EPOCHS, "finished")
    hidden = [project.store.trial(project.keys[0]).metrics, project.store.trial(project.keys[1]).adapter]
    for path in hidden:
        path.rename(path.with_name("not-seen-yet"))
    for key in project.keys:
        sync.on_end(key, None)
    tracker = Tracker(project.uri, tmp_path)
    status = {key: run.status for key, (run,) in tracker.runs_of(set(project.keys)).items()}
    assert [status[key] for key in project.keys] == ["RUNNING", "RUNNING", FINISHED]
    seen = threading.Timer(1.5, lambda: [path.with_name("not-seen-yet").rename(path) for path in hidden])
    seen.start()
    sync.settle(0)
    project.in_line()


def test_the_ledger_alone_makes_mlflow_anew(tmp_path: Path) -> None:
    project = Project(tmp_path, 2)
    for key in project.keys:
        project.train(key, EPOCHS, "finished")
    project.sync().record_done(set(project.keys))
    project.in_line()
    project.folder = tmp_path / "anew"
    project.folder.mkdir()
    project.uri = f"sqlite:///{project.folder / 'mlflow.db'}"
    project.empty_store()
    project.sync().record_done(set(project.keys))
    project.in_line()


def test_an_evaluation_brings_in_line_what_an_interrupted_sweep_left(tmp_path: Path) -> None:
    """`evaluate` after a sweep whose store was away to its end: trials get their runs before they are scored."""
    project = Project(tmp_path, 2)
    (study, *_) = project.plan.params.studies
    cell = type("Cell", (), {"study": study, "name": "c", "backbone": "mini-idefics2", "label": "HiFICL", "vary": {},
                             "search": {}, "row": "hificl", "task": "mini-vqa"})()  # fmt: skip
    project.plan.cells["c"] = cell
    project.plan.cell_of.update(dict.fromkeys(project.keys, "c"))
    first, second = project.keys
    for key in project.keys:
        project.train(key, EPOCHS, "finished")
    tracker = Tracker(project.uri, tmp_path)
    train = MlflowSync(tracker, project.store, project.plan, [study])
    train.open_sweeps()
    train.on_end(first, None)
    tracker.close_all(KILLED)
    evaluate = MlflowSync(Tracker(project.uri, tmp_path), project.store, project.plan, [study])
    evaluate.find_runs(project.keys)
    project.in_line()
    assert evaluate._scored.keys() == {first, second}
    assert evaluate.tracker.read_run(train.parents[study]).status == FINISHED
    before = ask(tmp_path, "select count(*) from runs")
    evaluate.find_runs(project.keys)  # nothing is left to do
    assert ask(tmp_path, "select count(*) from runs") == before == [(3,)]


def test_a_measurement_is_logged_once_with_the_run_that_it_names(tmp_path: Path) -> None:
    project = Project(tmp_path, 1)
    (key,) = project.keys
    project.train(key, EPOCHS, "finished")
    sync = project.sync()
    sync.record_done({key})
    run_id = sync.tracker.find_run(key)
    written = Measurement(trial=key, measure="cost", evaluation={}, run_id=run_id, numbers={"ms_per_sample": 1.5})
    sync.evaluations.write_measurement("0123456789abcdef", written)
    for _ in range(2):
        sync._scored = sync.tracker.runs_of({key})
        sync.measurement("0123456789abcdef")
    run = sync.tracker.read_run(run_id or "")
    assert run.metrics["ms_per_sample"] == 1.5 and run.evaluations == {"0123456789abcdef"}
    assert len(list((tmp_path / "mlartifacts").rglob("evaluation/0123456789abcdef.json"))) == 1


def test_a_score_waits_for_the_store_with_what_was_asked_before_it(tmp_path, away):
    project = Project(tmp_path, 1)
    (key,) = project.keys
    project.train(key, EPOCHS, "finished")
    sync = project.sync()
    sync.record_done({key})
    sync._scored = sync.tracker.runs_of({key})
    asked = EvaluationConfig(trial=key)
    sync.evaluations.write(asked.key, Evaluation(
        trial=key, config={}, evaluation=asked.model_dump(), metric="CIDEr", unit="fraction", value=0.5,
        metrics={"CIDEr": 0.5}, num_samples=8, predictions=(),
    ))  # fmt: skip
    away.after(1)
    sync.score(project.plan.trials[key], asked.key)
    sync.register([key])
    with pytest.raises(WorkError):
        sync.settle(0)
    away.back()
    sync.settle(0)
    run = sync.tracker.read_run(sync.tracker.find_run(key) or "")
    assert run.metrics["test_CIDEr"] == 0.5 and run.evaluations == {asked.key}
    (model,) = sync.tracker.mlflow.search_model_versions()
    assert model.tags["trial_key"] == key


def test_a_run_that_a_reader_has_begun_is_none_of_a_sweeps(tmp_path: Path) -> None:
    project = Project(tmp_path, 1)
    sync = project.sync()
    other = sync.tracker.open_sweep("study", tags={"sweep_key": "another"}, description="")
    sync.tracker.open_trial("study", other, TrialRunStart(project.keys[0], "n"))
    project.train(project.keys[0], EPOCHS, "finished")
    sync.record_done(set(project.keys))
    runs = sync.tracker.runs_of(set(project.keys))[project.keys[0]]
    assert sorted((run.status, run.parent == other) for run in runs) == [(FINISHED, False), ("RUNNING", True)]
