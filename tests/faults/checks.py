"""What must be true of a sweep after a fault."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.faults.sweeps import EPOCHS, STEPS, Sweep, cmdline

SECONDS = {"seconds", "train_seconds"}  # what may differ between two runs of a trial


def steps_trained(folder: Path) -> Counter[str]:
    """How often each step of each trial was trained, by any rank, as `tests/cluster/counting` has noted in a folder."""
    return Counter(line for file in folder.iterdir() for line in file.read_text().splitlines())


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
        points = dict(ask("select run_uuid, group_concat(step) from metrics where key='step/train_loss' group by 1"))
        for key, run, status in runs:
            if status != keys.get(key):
                problems.append(f"{key} is {status}, not {keys.get(key)}")
            have = sorted(int(step) for step in steps.get(run, "").split(",") if step)
            if status == "FINISHED" and have != list(range(1, epochs + 1)):
                problems.append(f"{key} has the steps {have}")
            curve = sorted(int(step) for step in points.get(run, "").split(",") if step)
            if status == "FINISHED" and curve != list(range(1, STEPS * epochs + 1)):
                problems.append(f"{key} has losses of the steps {curve}")
        for table, what in (("inputs", "dataset input"), ("params", "parameter")):
            if not ask(f"select count(*) from {table}")[0][0]:
                problems.append(f"no {what}")
    return problems


def report(sweep: Sweep, *, without: str | None = None) -> list[dict[str, str]]:
    """Score, write the report, and return its CSV without the runs' ids.

    Scored in this process: no fault is injected here, and a worker takes longer to start than to score.

    Args:
        sweep: whose trials have ended.
        without: the row that has no number, which the stage must name at its end.
    """
    from pipeline import report as reports
    from pipeline.config.load import load
    from pipeline.core.errors import WorkError
    from pipeline.pool import supervisor
    from pipeline.sweep import evaluate as evaluation

    before, pooled = Path.cwd(), supervisor.score_all
    os.chdir(sweep.folder)
    try:
        supervisor.score_all = score_here  # type: ignore[assignment]
        params = load()
        with pytest.raises(WorkError, match=f"1 of 4 cells have no number.*/{without}/") if without else nullcontext():
            evaluation.evaluate(params, ["small"], supervisor.Drivers())
        reports.write_study("small", params, Path("evaluations"), Path("reports"))
    finally:
        supervisor.score_all = pooled
        os.chdir(before)
    with (sweep.folder / "reports/small.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "run_ids"} for row in csv.DictReader(file)]


def score_here(params: Any, jobs: list[Any], first: Any = None) -> Iterator[tuple[str, Any]]:
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
    assert report(sweep) == reference["report"]
