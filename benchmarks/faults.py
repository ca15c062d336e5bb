"""What surviving costs a sweep that nothing disturbs: `hificl bench faults`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.overhead import prepare, timed
from benchmarks.support.timing import Findings, quartiles, report
from pipeline.records.journal import Journal
from pipeline.records.store import TrialStore


def run(
    device: str = "cpu", *, ranks: tuple[int, ...] = (2, 8), num_train_samples: int = 1000, rounds: int = 1
) -> dict[str, Any]:
    """Run a sweep of HiFICL trials on the miniature and add up what its own clocks say of checkpoints and ledger.

    `keeping_over_training` is the time that the workers spend on epoch checkpoints (written, synced to the disk, read
    back for their digests), adapters and the ledger's metrics, over the time of that, training and scoring.
    Left out is `done.json`, once a trial, whose writing takes what one epoch's metrics take.

    Args:
        device: cpu alone.
        ranks: of the trials, at two learning rates each.
        num_train_samples: of each trial.
        rounds: sweeps.
    """
    findings = Findings()
    shares: dict[str, list[float]] = {"keeping_over_training": []}
    seconds: dict[str, float] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            place = prepare(Path(folder) / "work", ranks, (8,), (0.0025, 0.005), num_train_samples, 1)
            timed(place, "-m", "stages.train")
            store = TrialStore(place / "runs")
            ends = [end for key in store.all_keys() if (end := store.done(key)) is not None]
            rows = Journal(place / "runs", whole=True).news()
        ended = next(row for row in reversed(rows) if row.event == "sweep ended")
        kept, trained = sum(end.keeping_seconds or 0.0 for end in ends), sum(end.seconds or 0.0 for end in ends)
        shares["keeping_over_training"].append(kept / (kept + trained))
        seconds = {"keeping": kept, "training": trained, "sweep": ended.number("seconds")}
    for name, values in shares.items():
        findings.ratios[name] = sorted(values)[len(values) // 2]
        findings.spread[name] = quartiles(values)
    sizes = {"trials": len(ends), "num_train_samples": num_train_samples, "cpu_count": os.cpu_count()}
    return report(findings, device=device, method=run.__doc__, sizes=sizes, seconds=seconds)
