"""Time and memory of a draw from files of VQAv2's full size: `hificl bench subsample`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.support import synthetic
from pipeline import tasks
from pipeline.sweep.draw import draw_manifest, plan_draw


class Sizes(TypedDict):
    """Sizes of a draw, as `sweep.draw.draw_manifest` takes them."""

    num_train: int
    num_selection: int
    num_evaluation: int


PROJECT = Path(__file__).resolve().parents[1]
SEED = 0
DRAWN: Sizes = {"num_train": 1_000, "num_selection": 500, "num_evaluation": 1_000}
_BYTES_PER_KIB = 1024 if sys.platform != "darwin" else 1  # ru_maxrss is in KiB, on macOS in bytes


def run(
    device: str = "cpu",
    *,
    train: synthetic.SyntheticSize = synthetic.FULL_TRAIN,
    val: synthetic.SyntheticSize = synthetic.FULL_VAL,
    drawn: Sizes = DRAWN,
    repeats: int = 3,
) -> dict[str, Any]:
    """Draw from made-up files of the full size, each time in a fresh process, and report time and peak memory.

    A draw is timed from files on disk to the manifest on disk: both splits' questions and annotations parsed,
    every file hashed, every drawn 640 x 480 JPEG decoded. The files have just been written, so they come from
    the page cache. The interpreter's start is in the memory and not in the time. `image_check_seconds` is the part of
    the time that reading and decoding the drawn images takes, measured again by itself. Where the machine is
    busy with other work, `cpu_seconds` says what the draw itself cost.

    Args:
        device: ignored; a draw uses no accelerator.
        train: size of the made-up training split.
        val: size of the made-up evaluation split.
        drawn: sizes of the draw, as `sweep.draw.draw_manifest` takes them.
        repeats: number of draws; medians are reported, and the spread between the extremes.

    Returns:
        `ratios` (seconds and GiB, medians), `spread` ((largest - smallest) / median), `machine`, `sizes`, `method`.
    """
    del device
    with tempfile.TemporaryDirectory(prefix="hificl-bench-") as folder:
        root = Path(folder)
        start = time.perf_counter()
        _write(root, train, val, drawn)
        prepared = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (root / "vqav2").iterdir())
        records = [_in_child(root, drawn) for _ in range(repeats)]
    if len({record["digest"] for record in records}) != 1:
        raise RuntimeError("the same draw gave different manifests")
    names = {
        "seconds": "seconds_443757",
        "cpu_seconds": "cpu_seconds_443757",
        "peak_gib": "peak_gib_443757",
        "check_seconds": "image_check_seconds",
    }
    values = {label: [record[key] for record in records] for key, label in names.items()}
    return {
        "ratios": {label: statistics.median(got) for label, got in values.items()},
        "spread": {label: (max(got) - min(got)) / statistics.median(got) for label, got in values.items()},
        "machine": _machine(),
        "sizes": {
            "train_questions": train.num_questions,
            "evaluation_questions": val.num_questions,
            "json_bytes": size,
            **drawn,
            "repeats": repeats,
        },
        "prepare_seconds": prepared,
        "method": " ".join((run.__doc__ or "").split("Args:")[0].split()),
    }


def _write(root: Path, train: synthetic.SyntheticSize, val: synthetic.SyntheticSize, drawn: Sizes) -> None:
    synthetic.write_vqav2(root, "train2014", train)
    synthetic.write_vqav2(root, "val2014", val, first_image=train.num_images + 1)
    for subset in ("train2014", "val2014"):
        (root / "images" / subset).mkdir(parents=True)
    names: dict[str, None] = {}
    for candidates in plan_draw(tasks.get("vqav2"), root, seed=SEED, **drawn):
        # A tenth more than wanted: candidates whose image another split has are passed over.
        for entry in candidates.entries[: candidates.wanted + candidates.wanted // 10 + 10]:
            names.update(dict.fromkeys(entry.images))
    synthetic.write_images(root, names)


def _in_child(root: Path, drawn: Sizes) -> dict[str, Any]:
    sizes = json.dumps(drawn)
    command = [sys.executable, "-m", "benchmarks.subsample", "--root", str(root), "--drawn", sizes]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measured draw failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _measure(root: Path, drawn: Sizes) -> dict[str, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    manifest = draw_manifest(tasks.get("vqav2"), root, seed=SEED, **drawn)
    manifest.save(root / "manifest.json")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_PER_KIB / 2**30
    start = time.perf_counter()
    manifest.verify_images()
    check_seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gib": peak,
        "check_seconds": check_seconds,
        "digest": manifest.digest,
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu_count": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="measure one draw from the files under this folder")
    parser.add_argument("--drawn", type=json.loads, default=DRAWN, help="sizes of the draw, as JSON")
    given = parser.parse_args()
    print(json.dumps(_measure(given.root, given.drawn) if given.root else run(drawn=given.drawn)))


if __name__ == "__main__":
    _main()
