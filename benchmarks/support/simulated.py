"""A sweep whose trials train nothing: its plan, and slots that take no time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil

from benchmarks.support.timing import Findings
from pipeline.config.load import BackboneSource, TrialRequest, load
from pipeline.config.trial import TrialConfig
from pipeline.plan.plan import Places, Plan
from pipeline.records.store import TrialStore
from pipeline.records.trial import EpochReport, TrialEnd, TrialReport

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"
EPOCHS, STEPS = 2, 250  # as a trial of the miniature has in an epoch
METRICS = ("train_loss", "ground_truth_loss", "alignment_loss", "selection_score", "objective", "train_seconds")


def make_plan(where: Path, number: int, findings: Findings) -> tuple[Plan, dict[str, TrialRequest]]:
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
    findings.file("plan_seconds", [time.perf_counter() - start])
    findings.file("plan_mib", [max(0.1, (psutil.Process().memory_info().rss - before) / 2**20)])
    return plan, requests


class SimulatedSlot:
    """A slot whose rounds take no time: one epoch of every trial in it, and the files that a worker writes."""

    def __init__(self, store: TrialStore) -> None:
        self.store, self.keys, self.workers, self.pids = store, set[str](), [0], list[int]()
        self.epoch: dict[str, int] = {}
        self.teacher: str | None = None
        self.why_room = ""

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

    async def advance(self) -> list[TrialReport]:
        """See `Slot`."""
        await asyncio.sleep(0)
        reports = []
        for key in sorted(self.keys):
            self.epoch[key] += 1
            folder, number = self.store.trial(key), self.epoch[key]
            row = EpochReport.among({"epoch": number, **dict.fromkeys(METRICS, 0.123456789)})
            folder.add_losses(number, [0.1234567] * STEPS)
            folder.write_epochs([*folder.epochs(), row])
            done = number >= EPOCHS
            if done:
                folder.finish(TrialEnd(status="finished", epochs=EPOCHS, objective=0.1))
            reports.append(TrialReport(key, number, row, "finished" if done else None))
        return reports
