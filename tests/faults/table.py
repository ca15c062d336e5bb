"""The table's words: what is injected, by a short name, and what happens; and how a table gets into its document."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

OUT = "HIFICL_FAULTS_TABLE"  # the document that a table goes into
RECORDS = ROOT / "benchmarks/faults"
KINDS = {
    "worker": ("SIGKILL of a worker", "its slot is rebuilt; the trial goes on at its last epoch"),
    "actor": ("SIGKILL of the trials' actors (Ray Tune's)", "Tune starts them anew; the worker trains on"),
    "raylet": ("SIGKILL of the raylet", "a new driver with a new cluster goes on, in the same command"),
    "head": ("SIGKILL of Ray's head (GCS)", "as for the raylet"),
    "driver": ("SIGKILL of the driver", "as for the raylet"),
    "dispatcher": ("SIGKILL of the dispatcher", "as for the raylet"),
    "stage": ("SIGKILL of the stage", "nothing outlives it; the next `dvc repro` goes on"),
    "dvc": ("SIGKILL of dvc", "the stage below it ends by itself; the next `dvc repro` goes on"),
    "SIGINT": ("SIGINT", "the sweep ends in order, open runs KILLED; the next `dvc repro` goes on"),
    "SIGTERM": ("SIGTERM", "as for SIGINT"),
    "Ctrl-C": ("Ctrl-C in a terminal (SIGINT to dvc and stage at once)", "as for SIGINT"),
    "SIGINT while it scores": ("SIGINT while it scores", "scoring ends in order; the next `dvc repro` scores the rest"),
    "SIGTERM while it scores": ("SIGTERM while it scores", "as for SIGINT"),
    "Ctrl-C while it scores": ("Ctrl-C in a terminal while it scores", "as for SIGINT"),
    "dvc while it scores": ("SIGKILL of dvc while it scores", "the stage below it ends by itself"),
    "two": ("two `dvc repro` at once", "the second ends at once and says which process holds the lock"),
    "node": ("a node leaves and comes back", "the slot waits for a place and is rebuilt; the trial goes on"),
    "notice": (
        "a spot instance's interruption notice",
        "the slot keeps its last step, leaves the node and is rebuilt on another; no attempt is counted",
    ),
    "torn": ("a torn checkpoint", "its digest gives it away; the trial goes on at the generation before"),
    "flipped": ("a checkpoint with a flipped bit", "as for a torn one"),
    "disk": (
        "a full disk (a small tmpfs, ENOSPC)",
        "the stage ends and names the file; with room again, `dvc repro` goes on",
    ),
    "clock": ("the wall clock jumps a day ahead, two back", "nothing: limits are counted on the monotonic clock"),
    "away": (
        "the MLflow server is away for a while",
        "training goes on; when the server answers again, MLflow is brought in line from `runs/`",
    ),
    "gone": (
        "the MLflow server is away for good",
        "all is trained; the stage fails and names server and `runs/`; the next `dvc repro` brings MLflow in line",
    ),
    "scoring away": (
        "the MLflow server goes away while it scores",
        "all is scored and written; the stage fails and names the server; the next `dvc repro` logs the scores",
    ),
    "memory": ("a worker without memory (RLIMIT_AS)", "the trial is tried again in a new worker"),
    "hang": ("a worker that hangs (SIGSTOP, `hang_seconds: 20`)", "the watchdog replaces it"),
    "diverged": ("a loss that is not finite", "the trial ends as diverged and names the step; the others train on"),
    "failing": (
        "a trial whose workers die again and again",
        "it ends as failed with its last error, the rest goes on, the stage fails; `dvc repro` resumes it",
    ),
}


def publish(opening: str, closing: str, lines: list[str], name: str, record: dict[str, Any]) -> None:
    """Write lines between their marks in the document that OUT names, if it does, and a record below benchmarks/."""
    if not os.environ.get(OUT):
        return
    from benchmarks.support.timing import commit, machine, versions

    document: Path = ROOT / os.environ[OUT]
    head, _, rest = document.read_text(encoding="utf-8").partition(opening)
    _, _, tail = rest.partition(closing)
    document.write_text(f"{head}{opening}\n" + "\n".join(lines) + f"\n{closing}{tail}", encoding="utf-8")
    RECORDS.mkdir(parents=True, exist_ok=True)
    whole = {**record, "machine": machine(), "versions": versions(), "commit": commit()}
    (RECORDS / name).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
