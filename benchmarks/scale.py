"""Thousands of trials on many nodes, with the work taken out: `hificl bench scale`."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.support.simulated import EPOCHS, SimulatedSlot, make_plan
from benchmarks.support.timing import Findings, main, report
from benchmarks.support.tracked import stores, track
from pipeline.config.load import Requests, TrialRequest
from pipeline.plan.plan import Plan
from pipeline.pool import cluster, tuner
from pipeline.pool.dispatcher import Dispatcher
from pipeline.pool.messages import Result, TrialEnded
from pipeline.pool.queue import Queue
from pipeline.records.store import TrialStore


def run(
    device: str = "cpu", *, num_trials: int = 5000, nodes: int = 64, tune_trials: Sequence[int] = (100, 400),
    measured_runs: int = 20, other_nodes: Sequence[int] = (1, 8),
) -> dict[str, Any]:  # fmt: skip
    """Put `num_trials` trials through what a sweep's head does, on `nodes` slots whose work takes no time.

    Real: the dispatcher's queue and rounds, the ledger on this disk, the plan, MLflow on SQLite (and on the PostgreSQL
    of HIFICL_BENCH_POSTGRES, where it is set). Simulated: the slots (they write what a worker writes, and train
    nothing) and Tune's waiting actors, which are coroutines of this process. Ray Tune itself runs for real in
    `tune_ms_*`, on fewer trials (`tune_processor_ms_*`: of the head's processor, the rest is waiting for its actors). A
    tracking store is filled to its size by copying the rows of a logged trial; the latencies are then of real calls at
    that size. All is on one machine, so no network is in any number. `_nodes_N` is the dispatcher with N slots and a
    fifth of the trials. Names ending in `_ms` are milliseconds, `_seconds` seconds, `_mib` MiB.

    Args:
        device: cpu; there is nothing for a GPU here.
        num_trials: of the sweep.
        nodes: slots.
        tune_trials: numbers of trials that Ray Tune runs, in ascending order.
        measured_runs: trials whose calls to the tracking store are timed, at each size.
        other_nodes: numbers of slots that the dispatcher is timed with besides.
    """
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        plan, requests = make_plan(where, num_trials, findings)
        _dispatch(plan, requests, nodes, findings)
        _ledger(plan, findings)
        for number in other_nodes:
            smaller = make_plan(where / f"nodes-{number}", max(number, num_trials // 5), Findings())
            seen = Findings()
            _dispatch(*smaller, number, seen)
            findings.take(seen, "dispatcher_ms_per_trial", f"dispatcher_ms_per_trial_nodes_{number}")
        for place in stores(where):
            track(place, plan, where, measured_runs, findings)
        for number in tune_trials:
            _tune(where / f"tune-{number}", number, findings)
    sizes = {"num_trials": num_trials, "nodes": nodes, "epochs": EPOCHS, "tune_trials": list(tune_trials),
             "measured_runs": measured_runs}  # fmt: skip
    left_out = [] if os.environ.get("HIFICL_BENCH_POSTGRES") else ["postgresql: HIFICL_BENCH_POSTGRES is not set"]
    return report(findings, device=device, method=run.__doc__, sizes=sizes, left_out=left_out)


def _plain_dispatcher() -> Any:
    """Return the dispatcher's class, outside an actor."""
    wrapped: Any = Dispatcher
    return wrapped.__ray_metadata__.modified_class


def _dispatch(plan: Plan, requests: dict[str, TrialRequest], nodes: int, findings: Findings) -> None:
    """Time the dispatcher: every trial from its submission to its last report."""
    process = psutil.Process()
    before = process.memory_info().rss
    seconds: list[float] = []
    decisions: list[float] = []

    async def sweep() -> None:
        store = TrialStore(plan.places.runs)
        queue = Queue(nodes, plan.params.sweep.retry.max_attempts, run_ahead=True)
        slots = [SimulatedSlot(store) for _ in range(nodes)]
        dispatcher = _plain_dispatcher()(Requests(requests), store, queue, slots)
        await dispatcher.start()
        waiting = iter(list(requests))

        async def proxy() -> None:
            for key in waiting:
                start = time.perf_counter()
                await dispatcher.submit({"trial": key})
                decisions.append(time.perf_counter() - start)
                seen = 0
                while (await dispatcher.next(key, seen)).end is None:
                    seen += 1
                seconds.append(time.perf_counter())

        await asyncio.gather(*(proxy() for _ in range(nodes + 1)))
        await dispatcher.close()

    start = time.perf_counter()
    asyncio.run(sweep())
    part = max(1, len(seconds) // 10)
    each = [1000 * (b - a) for a, b in zip([start, *seconds], seconds, strict=False)]
    findings.file("dispatcher_ms_per_trial", each)
    findings.file("dispatcher_last_over_first_tenth", [sum(each[-part:]) / sum(each[:part])])
    findings.file("decision_ms", [1000 * value for value in decisions])
    findings.file("dispatcher_mib", [max(0.1, (process.memory_info().rss - before) / 2**20)])
    findings.file("driver_mib", [process.memory_info().rss / 2**20])


def _ledger(plan: Plan, findings: Findings) -> None:
    """Time what a start reads of the trial store, and weigh it."""
    store = TrialStore(plan.places.runs)
    start = time.perf_counter()
    if plan.open_keys(store.finished):
        raise RuntimeError("the simulation left trials open")
    findings.file("ledger_read_seconds", [time.perf_counter() - start])
    files = [file for file in plan.places.runs.rglob("*") if file.is_file()]
    findings.file("ledger_kib_per_trial", [sum(file.stat().st_size for file in files) / 1024 / len(plan.trials)])
    findings.file("ledger_blocks_mib", [sum(file.stat().st_blocks * 512 for file in files) / 2**20])
    findings.file("ledger_files", [len(files)])


def _tune(where: Path, number: int, findings: Findings) -> None:
    """Time Ray Tune for real, its actors and the dispatcher's included; the slots alone are simulated."""
    import ray

    plan, _ = make_plan(where, number, Findings())
    base = _plain_dispatcher()

    def simulated(self: Any, *args: Any) -> None:
        base.__init__(self, *args)
        self.slots = [SimulatedSlot(self.store) for _ in self.slots]

    actor = ray.remote(num_cpus=0, max_concurrency=10000)(type("Simulated", (base,), {"__init__": simulated}))
    sweep = plan.params.sweep.model_copy(update={"slots": 1, "address": None, "search": "grid"})
    params = plan.params.model_copy(update={"sweep": sweep})
    seen: list[tuple[float, float]] = []

    def tell(message: Result) -> None:
        if isinstance(message, TrialEnded):
            seen.append((time.perf_counter(), time.process_time()))

    with cluster.running(sweep):
        tuner.run_trials(plan, list(plan.trials), params, tell, TrialStore(plan.places.runs), actor)
    half = seen[len(seen) // 2 :]
    findings.file(f"tune_ms_per_trial_{number}", [1000 * (b[0] - a[0]) for a, b in pairwise(half)])
    findings.file(f"tune_processor_ms_per_trial_{number}", [1000 * (half[-1][1] - half[0][1]) / max(1, len(half) - 1)])


if __name__ == "__main__":
    main(run)
