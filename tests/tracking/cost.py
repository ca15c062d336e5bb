"""What logging an adapter and registering it cost: `python -m tests.tracking.cost` prints seconds a trial."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline import adapters, backbones
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import FINISHED, TrialRunStart
from pipeline.tracking.registry import ModelCandidate, ModelRegistry, log_adapter

TRIALS = 20


def seconds(root: Path) -> dict[str, float]:
    """Return the median seconds of logging an adapter, and of registering it, over `TRIALS` trials."""
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    model = backbones.load("idefics2-8b-base", variant="tiny").model
    adapters.create("hificl", model).save_pretrained(root / "adapter", {"backbone": "b", "task": "vqav2"})
    tracker = Tracker(f"sqlite:///{root / 'mlflow.db'}", root)
    tracker.prepare(["study"])
    parent = tracker.open_sweep("study", tags={"sweep_key": "s"}, description="")
    logged, registered = [], []
    for number in range(TRIALS):
        key = f"{number:016x}"
        run = tracker.open_trial("study", parent, TrialRunStart(key=key, name="hificl"))
        start = time.perf_counter()
        log_adapter(tracker, run, root / "adapter")
        logged.append(time.perf_counter() - start)
        tracker.close(run, FINISHED)
        start = time.perf_counter()
        ModelRegistry(tracker).register(
            [ModelCandidate(key, "idefics2-8b-base", "vqav2", "hificl", float(number), "p")]
        )
        registered.append(time.perf_counter() - start)
    tracker.close(parent, FINISHED)
    return {"log_adapter": statistics.median(logged), "register": statistics.median(registered)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        json.dump({name: round(value, 3) for name, value in seconds(Path(folder)).items()}, sys.stdout)
        print()
