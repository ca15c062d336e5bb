"""DVC stage: write the miniature world's images and annotations in the official formats."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import Params
from pipeline.miniature.world import write_world
from stages.common import run


def main(params: Params) -> None:
    mini = params.miniature
    write_world(
        Path("data/miniature"), number=params.run.world, seed=mini.world_seed, num_train_images=mini.num_train_images,
        num_val_images=mini.num_val_images, difficulty=mini.difficulty,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
