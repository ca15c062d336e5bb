"""Visual tokens against the number of images: computed, read from the disk, found in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline import backbones
from pipeline.bench._timing import Findings
from pipeline.bench._trials import BACKBONE, CHECKPOINTS
from pipeline.miniature.world import write_world
from pipeline.train.visual_tokens import VisualTokens

READERS = ("compute", "disk", "memory")


def measure(device: str, *, numbers: Sequence[int] = (256, 1024, 4096)) -> Findings:
    """Time what an image's visual tokens cost among `numbers` of them, on the miniature, in milliseconds an image.

    `images_compute_ms_N` decodes the file, runs the vision tower and files the tokens; `images_disk_ms_N` is another
    process's first look at them (mapped and checked), `images_memory_ms_N` every later one.

    Args:
        device: cpu or cuda.
        numbers: N.
    """
    found = Findings()
    loaded = backbones.load(BACKBONE, weights=CHECKPOINTS / BACKBONE, device=device)
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            write_world(where / "data", num_train_images=number, num_val_images=1)
            images = sorted((where / "data").rglob("train2014/*.png"))
            writer, reader = (VisualTokens(loaded, where / "cache") for _ in range(2))
            for name, store in zip(READERS, (writer, reader, reader), strict=True):
                start = time.perf_counter()
                store.prefetch(images)
                found.file(f"images_{name}_ms_{number}", [1000 * (time.perf_counter() - start) / len(images)])
            if (writer.computed, reader.computed) != (len(images), 0):
                raise RuntimeError("images were computed twice")
    return found
