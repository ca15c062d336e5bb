"""What a trial's calls to MLflow take at an empty store and at a full one, and what the store weighs."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy

from benchmarks.support.timing import Findings
from pipeline.plan.plan import Plan
from pipeline.records.store import TrialStore
from pipeline.sweep.mlflow_sync import MlflowSync
from pipeline.tracking.client import Tracker
from pipeline.tracking.store import sqlite_file, sqlite_uri


def stores(where: Path) -> Iterator[tuple[str, str]]:
    """Yield name and address of the stores that are measured."""
    yield "sqlite", sqlite_uri(where / "mlflow.db")
    if uri := os.environ.get("HIFICL_BENCH_POSTGRES"):
        yield "postgresql", uri


def track(place: tuple[str, str], plan: Plan, where: Path, measured: int, findings: Findings) -> None:
    """Time the calls of a trial at an empty store and at a full one, and weigh the store."""
    name, uri = place
    study = f"scale-{uuid.uuid4().hex[:8]}"
    tracker = Tracker(uri, where)
    tracker.prepare([study])
    store = TrialStore(plan.places.runs)
    sync = _sync(tracker, store, plan, study)
    keys = list(plan.trials)
    empty = _log(sync, keys[:measured])
    findings.file(f"{name}_trial_ms_empty", [1000 * value for value in empty])
    before = _bytes(uri)
    copies = keys[measured : max(measured + 1, len(keys) - measured)]
    _copy(uri, keys[0], copies)
    findings.file(f"{name}_kib_per_trial", [(_bytes(uri) - before) / 1024 / len(copies)])
    findings.file(f"{name}_mib", [_bytes(uri) / 2**20])
    full = _log(sync, keys[-measured:])
    findings.file(f"{name}_trial_ms_full", [1000 * value for value in full])
    start = time.perf_counter()
    opened = Tracker(uri, where)
    opened.prepare([study])
    opened.end_leftovers()
    again = _sync(opened, store, plan, study)
    findings.file(f"{name}_ready_seconds", [time.perf_counter() - start])
    start = time.perf_counter()
    for key in keys[: measured // 2]:
        again.on_end(key, None)
    findings.file(f"{name}_record_done_ms_per_trial", [1000 * (time.perf_counter() - start) / max(1, measured // 2)])
    start = time.perf_counter()
    again.record_done(keys)
    findings.file(f"{name}_resume_seconds", [time.perf_counter() - start])
    for used in (again, sync):
        used.close_sweeps(failed=False)


def _sync(tracker: Tracker, store: TrialStore, plan: Plan, study: str) -> MlflowSync:
    sync = MlflowSync(tracker, store, plan, [study])
    sync.parents[study] = tracker.open_sweep(study, tags={"sweep_key": "scale"}, description="")
    return sync


def _log(sync: MlflowSync, keys: list[str]) -> list[float]:
    """Return the seconds that each trial's calls take, from its start to its end."""
    seconds = []
    for key in keys:
        start = time.perf_counter()
        sync.on_start(key)
        for row in sync.store.epochs(key):
            sync.on_report(key, row)
        sync.on_end(key, None)
        seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def _database(uri: str) -> Iterator[sqlalchemy.engine.Connection]:
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _copy(uri: str, key: str, copies: list[str]) -> None:
    """Fill the store with copies of one trial's run, each under another key."""
    with _database(uri) as connection:
        tables = sqlalchemy.MetaData()
        tables.reflect(connection, only=["runs", "tags", "params", "metrics", "latest_metrics"])
        tags = tables.tables["tags"]
        query = sqlalchemy.select(tags.c.run_uuid).where(tags.c.key == "trial_key", tags.c.value == key)
        (run_id, *_) = connection.execute(query).scalars().all()
        for table in (table for table in tables.sorted_tables if "run_uuid" in table.c):
            rows = [dict(row._mapping) for row in connection.execute(
                sqlalchemy.select(table).where(table.c.run_uuid == run_id))]  # fmt: skip
            new = [
                {**row, "run_uuid": f"{copy:0<32}", **({"value": copy} if row.get("key") == "trial_key" else {})}
                for copy in copies for row in rows
            ]  # fmt: skip
            for start in range(0, len(new), 5000):
                connection.execute(table.insert(), new[start : start + 5000])


def _bytes(uri: str) -> int:
    """Return what a store takes on disk."""
    file = sqlite_file(uri)
    if file is not None:
        with _database(uri) as connection:
            connection.execute(sqlalchemy.text("PRAGMA wal_checkpoint(TRUNCATE)"))
        return file.stat().st_size
    with _database(uri) as connection:
        return int(connection.execute(sqlalchemy.text("select pg_database_size(current_database())")).scalar_one())
