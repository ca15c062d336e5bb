"""A whole sweep against its training loops alone: `hificl bench overhead`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.timing import Findings, report
from pipeline import workspace
from pipeline.core import plain_yaml
from pipeline.core.errors import WorkError
from pipeline.records.store import TrialStore

STUDY = "overhead"
ROOT = Path(__file__).resolve().parents[1]


def run(
    device: str = "cpu",
    *,
    ranks: Sequence[int] = (4, 8),
    num_virtual_tokens: Sequence[int] = (8,),
    learning_rates: Sequence[float] = (0.0025, 0.005, 0.01, 0.02),
    num_train_samples: int = 1000,
    pack: int | str = "auto",
    noop_repeats: int = 3,
) -> dict[str, Any]:
    """Time `dvc repro` of a sweep of 8 HiFICL trials on the miniature, and the same trials' training loops alone.

    The sweep includes everything: DVC, Ray's start and end, the pool, Ray Tune, MLflow, checkpoints, the ledger. The
    loops run one after another in one process on one thread, with the backbone loaded once. `noop_repro_seconds` is
    `dvc repro` of the whole pipeline, scored and reported, with nothing to do; `noop_train_seconds` of the sweep's
    stage. Another sweep has two of the trials, a slot each: `first_step_seconds` is from the command to the first
    training step (the end of a trial less the seconds of its epochs). One round of each.

    Args:
        device: cpu alone.
        ranks: of the grid.
        num_virtual_tokens: of the grid.
        learning_rates: of the grid.
        num_train_samples: of each trial.
        pack: `sweep.pack`.
        noop_repeats: rounds of the no-op.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(Path(folder) / "work", ranks, num_virtual_tokens, learning_rates, num_train_samples, pack)
        bare = timed(place, "-m", "benchmarks.support.bare", str(Path(folder) / "bare"))
        sweep = timed(place, "-m", "dvc", "repro", "-s", "train")
        stage = [timed(place, "-m", "dvc", "repro", "-s", "train") for _ in range(noop_repeats)]
        timed(place, "-m", "dvc", "repro")  # evaluates and reports
        noop = [timed(place, "-m", "dvc", "repro") for _ in range(noop_repeats)]
        pair = prepare(
            Path(folder) / "pair", ranks[-1:], num_virtual_tokens[-1:], learning_rates[-2:], num_train_samples, pack=1
        )
        bare_pair = timed(pair, "-m", "benchmarks.support.bare", str(Path(folder) / "bare-pair"))
        started = time.time()
        sweep_pair = timed(pair, "-m", "dvc", "repro", "-s", "train")
        first_step = _first_step(pair / "runs") - started
    trials = len(ranks) * len(num_virtual_tokens) * len(learning_rates)
    findings = Findings()
    findings.file("sweep_over_bare_loops", [sweep / bare])
    findings.file("two_trials_over_bare_loops", [sweep_pair / bare_pair])
    findings.file("first_step_seconds", [first_step])
    findings.file("noop_repro_seconds", noop)
    findings.file("noop_train_seconds", stage)
    sizes = {"trials": trials, "num_train_samples": num_train_samples, "pack": pack, "cpu_count": os.cpu_count()}
    seconds = {
        "sweep": sweep, "bare_loops": bare, "beyond_loops_per_trial": (sweep - bare / _slots()) / trials,
        "sweep_of_two": sweep_pair, "bare_loops_of_two": bare_pair,
    }  # fmt: skip
    return report(findings, device=device, method=run.__doc__, sizes=sizes, seconds=seconds)


def _first_step(runs: Path) -> float:
    """Return when the first trial began its first step, in seconds since 1970."""
    store = TrialStore(runs)
    began = []
    for key in store.all_keys():
        seconds = sum(epoch.seconds or 0.0 for epoch in store.epochs(key))
        began.append(store.trial(key).metrics.stat().st_mtime - seconds)
    return min(began)


def _slots() -> int:
    return os.cpu_count() or 1


def prepare(
    folder: Path, ranks: Sequence[int], tokens: Sequence[int], rates: Sequence[float], samples: int, pack: int | str
) -> Path:
    """Return a workspace with a study of HiFICL over a grid on the miniature, its world made and its subset drawn."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        workspace.make_workspace(folder, profile="mini")
    finally:
        os.chdir(before)
    shutil.copy(ROOT / "dvc.lock", folder / "dvc.lock")  # the backbones are made
    study = {
        "title": "The sweep that is timed", "backbones": ["idefics2-8b-base"], "tasks": ["vqav2"],
        "methods": {"hificl": {"search": {
            "rank": list(ranks), "num_virtual_tokens": list(tokens), "learning_rate": list(rates),
        }}},
    }  # fmt: skip
    profile = {
        "extends": "mini", "studies": [STUDY], "tasks": ["mini-vqa"], "backbones": ["mini-idefics2"],
        "sweep": {"pack": pack}, "train": {"num_train_samples": samples},
        "subsample": {"num_train": samples, "num_evaluation": 20},
    }  # fmt: skip
    params = plain_yaml.read_file(folder / "params.yaml")
    params["profile"] = STUDY
    params["miniature"].update(num_train_images=2 * samples + 800, num_val_images=40)
    for kind, content in (("studies", study), ("profiles", profile)):
        own = folder / kind  # a link so far, into the root's
        shutil.copytree(own.resolve(), own.with_name("copied"))
        own.unlink()
        own.with_name("copied").rename(own)
        (own / f"{STUDY}.yaml").write_text(plain_yaml.write(content), encoding="utf-8")
    (folder / "params.yaml").write_text(plain_yaml.write(params), encoding="utf-8")
    for words in (["-m", "stages.world"], ["-m", "stages.subsample", "mini-vqa"]):
        timed(folder, *words)
    return folder


def timed(folder: Path, *words: str) -> float:
    """Run Python with `words` in `folder`; return the seconds.

    Raises:
        WorkError: it failed.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False,
        env={**workspace.active(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        raise WorkError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - start
