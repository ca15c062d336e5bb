"""Thousands of trials on many nodes, with the work taken out: `hificl bench scale`."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy

from pipeline.bench._main import main
from pipeline.bench._timing import Findings, quartiles, report
from pipeline.config import BackboneSource, load
from pipeline.request import Requests, TrialRequest
from pipeline.sweep import tuner
from pipeline.sweep.dispatcher import Dispatcher
from pipeline.sweep.logbook import Logbook
from pipeline.sweep.plan import Places, Plan
from pipeline.sweep.store import TrialStore
from pipeline.tracking.runs import FINISHED, Tracker
from pipeline.trial import TrialConfig

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"
EPOCHS = 2
METRICS = ("train_loss", "ground_truth_loss", "alignment_loss", "selection_score", "objective", "train_seconds")


def run(
    device: str = "cpu", *, num_trials: int = 5000, nodes: int = 64, tune_trials: Sequence[int] = (100, 400),
    measured_runs: int = 20,
) -> dict[str, Any]:  # fmt: skip
    """Put `num_trials` trials through what a sweep's head does, on `nodes` slots whose work takes no time.

    Real: the dispatcher's queue and rounds, the ledger on this disk, the plan, MLflow on SQLite (and on the PostgreSQL
    of HIFICL_BENCH_POSTGRES, where it is set). Simulated: the slots (they write what a worker writes, and train
    nothing) and Tune's waiting actors, which are coroutines of this process. Ray Tune itself runs for real in
    `tune_ms_*`, on two of its actors and fewer trials. A tracking store is filled to its size by copying the rows of a
    logged trial; the latencies are then of real calls at that size. All is on one machine, so no network is in
    any number. Names ending in `_ms` are milliseconds, `_seconds` seconds, `_mib` MiB.

    Args:
        device: cpu; there is nothing for a GPU here.
        num_trials: of the sweep.
        nodes: slots.
        tune_trials: numbers of trials that Ray Tune runs, in ascending order.
        measured_runs: trials whose calls to the tracking store are timed, at each size.
    """
    found = Findings()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        plan, requests = _plan(where, num_trials, found)
        _dispatch(plan, requests, nodes, found)
        _ledger(plan, found)
        for place in _stores(where):
            _track(place, plan, where, measured_runs, found)
        for number in tune_trials:
            _tune(where / f"tune-{number}", number, found)
    sizes = {"num_trials": num_trials, "nodes": nodes, "epochs": EPOCHS, "tune_trials": list(tune_trials),
             "measured_runs": measured_runs}  # fmt: skip
    left_out = [] if os.environ.get("HIFICL_BENCH_POSTGRES") else ["postgresql: HIFICL_BENCH_POSTGRES is not set"]
    return report(found, device=device, method=run.__doc__, sizes=sizes, left_out=left_out)


def _file(found: Findings, name: str, values: Sequence[float]) -> None:
    found.ratios[name], found.spread[name] = statistics.median(values), quartiles(list(values))


def _plan(where: Path, number: int, found: Findings) -> tuple[Plan, dict[str, TrialRequest]]:
    """Return a plan of trials that differ in seed and rank, and what a slot is told of each."""
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    params = load(PARAMS)
    plan = Plan(params, Places(where / "runs", where / "manifests", None))
    for seed in range(number):
        config = TrialConfig(
            backbone="mini-idefics2", backbone_digest="0" * 64, task="mini-vqa", manifest_digest="1" * 64,
            method="hificl", options={"rank": 1 + seed % 16, "num_virtual_tokens": 8}, seed=seed, epochs=EPOCHS,
            num_train_samples=1000, learning_rate=0.005, micro_batch_size=2, accumulation=2, engine="torch",
        )  # fmt: skip
        plan.trials[config.key] = config
    source = BackboneSource()
    requests = {
        key: TrialRequest(config, str(plan.places.runs / key), "", source) for key, config in plan.trials.items()
    }
    _file(found, "plan_seconds", [time.perf_counter() - start])
    _file(found, "plan_mib", [max(0.1, (psutil.Process().memory_info().rss - before) / 2**20)])
    return plan, requests


class SimulatedSlot:
    """A slot whose rounds take no time: one epoch of every trial in it, and the files that a worker writes."""

    def __init__(self, store: TrialStore) -> None:
        self.store, self.keys, self.workers, self.pids = store, set[str](), [0], list[int]()
        self.epoch: dict[str, int] = {}

    async def build(self) -> None:
        """See `Slot`."""

    async def room(self) -> int:
        """See `Slot`."""
        return 1 - len(self.keys)

    def drop(self) -> None:
        """See `Slot`."""

    async def admit(self, request: TrialRequest) -> int:
        """See `Slot`."""
        self.keys.add(request.key)
        self.epoch[request.key] = 0
        return 0

    async def evict(self, key: str) -> None:
        """See `Slot`."""
        self.keys.discard(key)

    async def advance(self) -> list[dict[str, Any]]:
        """See `Slot`."""
        await asyncio.sleep(0)
        reports = []
        for key in sorted(self.keys):
            self.epoch[key] += 1
            row = {"epoch": self.epoch[key], **dict.fromkeys(METRICS, 0.123456789)}
            with (self.store.folder(key) / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{row}\n".replace("'", '"'))
            done = self.epoch[key] >= EPOCHS
            if done:
                self.store.finish(key, {"status": "finished", "epochs": EPOCHS, "objective": 0.1})
            reports.append({**row, "trial_key": key, "done": done})
        return reports


def _plain_dispatcher() -> Any:
    """Return the dispatcher's class, outside an actor."""
    wrapped: Any = Dispatcher
    return wrapped.__ray_metadata__.modified_class


def _dispatch(plan: Plan, requests: dict[str, TrialRequest], nodes: int, found: Findings) -> None:
    """Time the dispatcher: every trial from its submission to its last report."""
    process = psutil.Process()
    before = process.memory_info().rss
    seconds: list[float] = []
    decisions: list[float] = []

    async def sweep() -> None:
        dispatcher = _plain_dispatcher()(
            Requests(requests), plan.params.sweep, str(plan.places.runs), nodes, 1, True
        )  # fmt: skip
        dispatcher.slots = [SimulatedSlot(dispatcher.store) for _ in range(nodes)]
        await dispatcher.start()
        waiting = iter(list(requests))

        async def proxy() -> None:
            for key in waiting:
                start = time.perf_counter()
                await dispatcher.submit({"trial": key})
                decisions.append(time.perf_counter() - start)
                seen = 0
                while not (await dispatcher.next(key, seen))["done"]:
                    seen += 1
                seconds.append(time.perf_counter())

        await asyncio.gather(*(proxy() for _ in range(nodes + 1)))
        await dispatcher.close()

    start = time.perf_counter()
    asyncio.run(sweep())
    part = max(1, len(seconds) // 10)
    each = [1000 * (b - a) for a, b in zip([start, *seconds], seconds, strict=False)]
    _file(found, "dispatcher_ms_per_trial", each)
    found.ratios["dispatcher_last_over_first_tenth"] = sum(each[-part:]) / sum(each[:part])
    found.spread["dispatcher_last_over_first_tenth"] = [found.ratios["dispatcher_last_over_first_tenth"]] * 2
    _file(found, "decision_ms", [1000 * one for one in decisions])
    _file(found, "dispatcher_mib", [max(0.1, (process.memory_info().rss - before) / 2**20)])
    _file(found, "driver_mib", [process.memory_info().rss / 2**20])


def _ledger(plan: Plan, found: Findings) -> None:
    """Time what a start reads of the trial store, and weigh it."""
    store = TrialStore(plan.places.runs)
    start = time.perf_counter()
    if plan.open_keys(store):
        raise RuntimeError("the simulation left trials open")
    _file(found, "ledger_read_seconds", [time.perf_counter() - start])
    files = [file for file in plan.places.runs.rglob("*") if file.is_file()]
    _file(found, "ledger_kib_per_trial", [sum(file.stat().st_size for file in files) / 1024 / len(plan.trials)])
    _file(found, "ledger_blocks_mib", [sum(file.stat().st_blocks * 512 for file in files) / 2**20])
    _file(found, "ledger_files", [len(files)])


def _stores(where: Path) -> Iterator[tuple[str, str]]:
    yield "sqlite", f"sqlite:///{where / 'mlflow.db'}"
    if uri := os.environ.get("HIFICL_BENCH_POSTGRES"):
        yield "postgresql", uri


def _track(place: tuple[str, str], plan: Plan, where: Path, measured: int, found: Findings) -> None:
    """Time the calls of a trial at an empty store and at a full one, and weigh the store."""
    name, uri = place
    study = f"scale-{uuid.uuid4().hex[:8]}"
    tracker = Tracker(uri, where)
    tracker.prepare([study])
    parent = tracker.open_sweep(study, tags={"sweep_key": "scale"}, description="")
    store = TrialStore(plan.places.runs)
    keys = list(plan.trials)
    empty = _log(tracker, store, plan, {study: parent}, keys[:measured])
    _file(found, f"{name}_trial_ms_empty", [1000 * one for one in empty])
    before = _bytes(uri)
    copies = keys[measured : max(measured + 1, len(keys) - measured)]
    _copy(uri, keys[0], copies)
    _file(found, f"{name}_kib_per_trial", [(_bytes(uri) - before) / 1024 / len(copies)])
    _file(found, f"{name}_mib", [_bytes(uri) / 2**20])
    full = _log(tracker, store, plan, {study: parent}, keys[-measured:])
    _file(found, f"{name}_trial_ms_full", [1000 * one for one in full])
    again = Tracker(uri, where)
    parent = again.open_sweep(study, tags={"sweep_key": "scale"}, description="")
    logbook = Logbook(again, store, plan, {study: parent}, {})
    start = time.perf_counter()
    for key in keys[: measured // 2]:
        logbook.record(key)
    _file(found, f"{name}_record_done_ms_per_trial", [1000 * (time.perf_counter() - start) / max(1, measured // 2)])
    start = time.perf_counter()
    logbook.record_done(keys)
    _file(found, f"{name}_resume_seconds", [time.perf_counter() - start])
    for one in (again, tracker):
        one.close(parent, FINISHED)


def _log(tracker: Tracker, store: TrialStore, plan: Plan, parents: dict[str, str], keys: list[str]) -> list[float]:
    """Return the seconds that each trial's calls take, from its start to its end."""
    logbook = Logbook(tracker, store, plan, parents, {})
    seconds = []
    for key in keys:
        start = time.perf_counter()
        logbook.on_start(key)
        for row in store.epochs(key):
            logbook.on_report(key, row)
        logbook.on_end(key, None)
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
        for table in (one for one in tables.sorted_tables if "run_uuid" in one.c):
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
    if uri.startswith("sqlite"):
        file = uri.removeprefix("sqlite:///")
        with _database(uri) as connection:
            connection.execute(sqlalchemy.text("PRAGMA wal_checkpoint(TRUNCATE)"))
        return Path(file).stat().st_size
    with _database(uri) as connection:
        return int(connection.execute(sqlalchemy.text("select pg_database_size(current_database())")).scalar_one())


def _tune(where: Path, number: int, found: Findings) -> None:
    """Time Ray Tune for real, its actors and the dispatcher's included; the slots alone are simulated."""
    import ray

    plan, _ = _plan(where, number, Findings())
    base = _plain_dispatcher()

    def simulated(self: Any, *args: Any) -> None:
        base.__init__(self, *args)
        self.slots = [SimulatedSlot(self.store) for _ in self.slots]

    actor = ray.remote(num_cpus=0, max_concurrency=10000)(type("Simulated", (base,), {"__init__": simulated}))
    sweep = plan.params.sweep.model_copy(update={"slots": 1, "address": None, "search": "grid"})
    params = plan.params.model_copy(update={"sweep": sweep})
    seen: list[float] = []

    class Clock:
        def on_start(self, key: str) -> None:
            """See `tuner.Watcher`."""

        def on_report(self, key: str, report: dict[str, Any]) -> None:
            """See `tuner.Watcher`."""

        def on_end(self, key: str, error: str | None) -> None:
            """See `tuner.Watcher`."""
            seen.append(time.perf_counter())

    with tuner.cluster(sweep):
        tuner.run_trials(plan, list(plan.trials), params, [Clock()], actor)
    each = [1000 * (b - a) for a, b in zip(seen, seen[1:], strict=False)]
    _file(found, f"tune_ms_per_trial_{number}", each[len(each) // 2 :])


if __name__ == "__main__":
    main(run)
