"""A small sweep on the miniature, what can be done to it, and what must be true of it afterwards."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline.sweep.journal import Journal
from tests.conftest import ROOT
from tests.e2e.conftest import Project

MARK = "HIFICL_FAULT"
EPOCHS = 3
STUDY = {
    "title": "A sweep that is disturbed", "backbones": ["idefics2-8b-base"], "tasks": ["vqav2"],
    # a teacher, demonstrations that are drawn anew, dropout, and the method without either
    "methods": {"hificl": {"search": {"rank": [1, 2]}}, "live": None, "lora": {"method": "lora", "rank": 2}},
}  # fmt: skip
SECONDS = {"seconds", "train_seconds"}  # what may differ between two runs of a trial
Running = Callable[["Sweep"], bool]


class Sweep(Project):
    """A workspace, and the processes that were started in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark}
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        self.seen_done: dict[str, int] = {}
        self.stage: subprocess.Popen | None = None

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def log(self) -> str:
        return (self.folder / "started.log").read_text()

    def copy(self, folder: Path) -> Sweep:
        shutil.copytree(self.folder, folder, symlinks=True)
        return Sweep(folder)

    # -- running -------------------------------------------------------------------------------------------------------

    def begin(self, *words: str, log: str = "started.log", **environment: str) -> subprocess.Popen:
        with (self.folder / log).open("w") as file:
            self.stage = subprocess.Popen(
                [sys.executable, *(words or ("-m", "stages.train"))], cwd=self.folder, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, env={**self.environment, **environment},
            )  # fmt: skip
        return self.stage

    def ended(self, seconds: float = 300) -> int:
        """Wait for the stage; return its status."""
        assert self.stage is not None
        try:
            return self.stage.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the stage does not end:\n{self.log[-3000:]}") from None

    def again(self, *words: str, **environment: str) -> None:
        """Run the stage to its good end."""
        self.begin(*words, **environment)
        assert self.ended() == 0, self.log[-4000:]

    def until(self, true: Callable[[], Any], what: str, seconds: float = 240) -> Any:
        """Wait until `true` gives something, which is returned; the stage must be running."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = true()
            if found:
                return found
            assert self.stage is None or self.stage.poll() is None, f"ended before {what}:\n{self.log[-4000:]}"
            time.sleep(0.02)
        raise AssertionError(f"{what} did not come within {seconds:.0f} s:\n{self.log[-4000:]}")

    def midway(self) -> None:
        """Wait until a trial is done and another has an epoch behind it."""

        def true() -> bool:
            ends = set(self.ends())
            return bool(ends) and any(
                path.parent.parent.parent.name not in ends for path in self.runs.glob("*/checkpoint/epoch-*/state.json")
            )

        self.until(true, "a done trial and one with an epoch")
        self.remember()

    def remember(self) -> None:
        """Note when each finished trial was finished: none may be touched again."""
        ends = self.ends()
        done = {path.parent.name: path.stat().st_mtime_ns for path in self.runs.glob("*/done.json")}
        self.seen_done = {key: at for key, at in done.items() if ends.get(key, {}).get("status") == "finished"}

    # -- what is there -------------------------------------------------------------------------------------------------

    def ends(self) -> dict[str, dict[str, Any]]:
        found = {}
        for path in self.runs.glob("*/done.json"):
            found[path.parent.name] = json.loads(path.read_text())
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.runs / "journal.jsonl"
        if not path.exists():
            return []
        journal = Journal(self.runs)
        journal._seen = 0
        return [row for row in journal.news() if row["event"] == name]

    def workers(self) -> list[int]:
        """Process ids of the newest slot's workers."""
        built = self.events("slot built")
        return built[-1]["pids"] if built else []

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Processes that descend from what was started here, whose command line holds `part`."""
        return [one for one in marked(self.mark) if part in " ".join(cmdline(one))]

    def kill(self, part: str, how: int = signal.SIGKILL) -> float:
        """Send a signal to all processes of a kind; return when (seconds since 1970)."""
        found = self.processes(part)
        assert found, f"no process {part}"
        for process in found:
            process.send_signal(how)
        return time.time()

    def clean_up(self) -> None:
        while left := self.processes():
            for process in left:
                process.kill()
            time.sleep(0.1)


def marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# -- making one ------------------------------------------------------------------------------------------------------


def make_sweep(folder: Path) -> Sweep:
    """A workspace with four trials of three epochs on a small world, manifests drawn."""
    from pipeline.workspace import create

    before = Path.cwd()
    os.chdir(ROOT)
    try:
        create(folder, profile="mini")
    finally:
        os.chdir(before)
    made = Sweep(folder)

    def edit(raw: dict[str, Any]) -> None:
        raw["studies"] = {"small": STUDY}
        for section in (raw, raw["run"]):
            section.pop("study_changes", None)
        raw["run"].update(
            studies=["small"], tasks=["mini-vqa"], backbones=["mini-idefics2"], methods={},
            sweep={"pack": 1, "slots": 1},
            subsample={"num_train": 16, "num_selection": 8, "num_evaluation": 8},
            train={
                "num_train_samples": 16, "num_selection_samples": 8, "micro_batch_size": 4, "accumulation": 1,
                "epochs_below_1000": EPOCHS, "num_shots": 2, "selection_metric": "loss",
            },
        )  # fmt: skip
        raw["miniature"].update(num_train_images=60, num_val_images=20)
        raw["tracking"]["system_metrics"] = False

    made.change(edit)
    # the store's tables, which a sweep would take seconds to make
    tables = f"from pipeline.tracking.runs import Tracker; Tracker('sqlite:///{folder}/mlflow.db', '.').prepare([])"
    for words in (("-m", "stages.world"), ("-m", "stages.subsample", "mini-vqa"), ("-c", tables)):
        made.python(*words)
    return made


def set_sweep(sweep: Sweep, **values: Any) -> None:
    sweep.change(lambda raw: raw["run"]["sweep"].update(values))


def set_tracking(sweep: Sweep, **values: Any) -> None:
    sweep.change(lambda raw: raw["tracking"].update(values))


# -- what must be true -----------------------------------------------------------------------------------------------


def results(sweep: Sweep) -> dict[str, Any]:
    """Everything that training gives, by trial, without the seconds it took."""
    found = {}
    for key, end in sweep.ends().items():
        path = sweep.runs / key / "metrics.jsonl"  # a trial that diverged at once has none
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found[key] = {
            "status": end["status"], "chosen": end.get("chosen_epoch"), "adapter": end.get("adapter_digest"),
            "rows": [{k: v for k, v in row.items() if k not in SECONDS} for row in rows],
        }  # fmt: skip
    return found


def mlflow_problems(database: Path, keys: dict[str, str], epochs: int = EPOCHS) -> list[str]:
    """What is wrong in an MLflow store: read from its SQLite file, beside MLflow itself.

    Args:
        database: the file.
        keys: the end state (FINISHED, ...) that each trial's run must have.
        epochs: that each finished run must have.
    """
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:

        def ask(sql: str) -> list[tuple]:
            return db.execute(sql).fetchall()

        problems = [f"run {run} is RUNNING" for (run,) in ask("select run_uuid from runs where status='RUNNING'")]
        twice = "select run_uuid, key, step from metrics where key not like 'system/%' group by 1, 2, 3"
        problems += [f"{row} is there twice" for row in ask(f"{twice} having count(*) > 1")]
        orphans = "select t.run_uuid from tags t where t.key='mlflow.parentRunId' and not exists"
        problems += [f"{run} has no parent" for (run,) in ask(f"{orphans} (select 1 from runs where run_uuid=t.value)")]
        runs = ask(
            "select t.value, r.run_uuid, r.status from tags t join runs r using (run_uuid) where t.key='trial_key'"
        )
        if sorted(key for key, *_ in runs) != sorted(keys):
            problems.append(f"runs of {sorted(key for key, *_ in runs)}, trials {sorted(keys)}")
        steps = dict(ask("select run_uuid, group_concat(step) from metrics where key='train_loss' group by run_uuid"))
        for key, run, status in runs:
            if status != keys.get(key):
                problems.append(f"{key} is {status}, not {keys.get(key)}")
            have = sorted(int(step) for step in steps.get(run, "").split(",") if step)
            if status == "FINISHED" and have != list(range(1, epochs + 1)):
                problems.append(f"{key} has the steps {have}")
        for table, what in (("inputs", "dataset input"), ("params", "parameter")):
            if not ask(f"select count(*) from {table}")[0][0]:
                problems.append(f"no {what}")
    return problems


def report(sweep: Sweep) -> list[dict[str, str]]:
    """Score, write the report, and return its CSV without the runs' ids.

    Scored in this process: no fault is injected here, and a worker takes longer to start than to score.
    """
    from pipeline import report as reports
    from pipeline.config import load
    from pipeline.sweep import evaluation, evaluators

    before, pooled = Path.cwd(), evaluators.score_all
    os.chdir(sweep.folder)
    try:
        evaluators.score_all = score_here  # type: ignore[assignment]
        params = load()
        evaluation.evaluate(params, ["small"])
        reports.write_study("small", params, Path("evaluations"), Path("reports"))
    finally:
        evaluators.score_all = pooled
        os.chdir(before)
    with (sweep.folder / "reports/small.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "run_ids"} for row in csv.DictReader(file)]


def score_here(params: Any, jobs: list[Any]) -> Iterator[tuple[str, Any]]:
    from pipeline.train.workbench import Workbench

    bench = Workbench(batch_size=params.evaluate.generation.batch_size)
    for request, config in jobs:
        yield config.key, bench.score(request, config)


def nothing_left(sweep: Sweep, seconds: float = 10) -> float:
    """Wait until no process of the sweep is left; return how long that took."""
    started = time.monotonic()
    while left := sweep.processes():
        waited = time.monotonic() - started
        assert waited < seconds, f"left after {waited:.0f} s: {[cmdline(one)[:3] for one in left]}"
        time.sleep(0.1)
    return time.monotonic() - started


def survived(sweep: Sweep, reference: dict[str, Any], database: Path | None = None) -> None:
    """Check that nothing is lost, nothing was done twice, and that everything equals the undisturbed run."""
    nothing_left(sweep)
    assert results(sweep) == reference["results"]
    now = {path.parent.name: path.stat().st_mtime_ns for path in sweep.runs.glob("*/done.json")}
    assert {key: now[key] for key in sweep.seen_done} == sweep.seen_done  # what had finished was not touched
    ends = dict.fromkeys(reference["results"], "FINISHED")
    assert mlflow_problems(database or sweep.folder / "mlflow.db", ends) == []
    assert not list(sweep.runs.glob(".spool/*"))
    assert report(sweep) == reference["report"]
