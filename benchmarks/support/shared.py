"""What trials and processes share on the miniature: a teacher's pass, and an image's visual tokens."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support.timing import Findings
from benchmarks.support.trials import BACKBONE, CHECKPOINTS, both_ways, train, trials
from pipeline import backbones
from pipeline.miniature.world import write_world
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.train.workbench import Workbench

_TEACHER = "teacher_shared_over_separate_K{}"
_READERS = ("compute", "disk", "memory")


def teacher_pass(device: str, *, num_trials: int = 8, num_samples: int = 32, repeats: int = 3) -> Findings:
    """Time K trials of MimIC (8-shot teacher, different learning rates) that share one teacher pass, and one at a time.

    Args:
        device: cpu or cuda.
        num_trials: K.
        num_samples: of each trial.
        repeats: rounds.
    """
    findings = Findings()
    with trials(num_samples) as made:
        bench = Workbench(device=device)

        def requests(place: str) -> list:
            rates = [0.001 * (1 + i) for i in range(num_trials)]
            return [made.request("mimic", place, {}, learning_rate=rate, weight_decay=0.001) for rate in rates]

        train(bench, requests("warm-up")[:1])
        findings.add(_TEACHER.format(num_trials), both_ways(bench, requests, repeats), "together", "alone")
    return findings


def visual_tokens(device: str, *, numbers: Sequence[int] = (256, 1024, 4096)) -> Findings:
    """Time what an image's visual tokens cost among `numbers` of them, on the miniature, in milliseconds an image.

    `images_compute_ms_N` decodes the file, runs the vision tower and files the tokens; `images_disk_ms_N` is another
    process's first look at them (mapped and checked), `images_memory_ms_N` every later one.

    Args:
        device: cpu or cuda.
        numbers: N.
    """
    findings = Findings()
    loaded = backbones.load(BACKBONE, weights=CHECKPOINTS / BACKBONE, device=device)
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            write_world(where / "data", num_train_images=number, num_val_images=1)
            images = sorted((where / "data").rglob("train2014/*.png"))
            writer, reader = (VisualTokens(loaded, where / "cache") for _ in range(2))
            for name, store in zip(_READERS, (writer, reader, reader), strict=True):
                start = time.perf_counter()
                store.prefetch(images)
                findings.file(f"images_{name}_ms_{number}", [1000 * (time.perf_counter() - start) / len(images)])
            if (writer.computed, reader.computed) != (len(images), 0):
                raise RuntimeError("images were computed twice")
    return findings
