"""DVC stage: draw the samples of every task, or of those named, and write their manifests."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config import Params, data_root
from pipeline.data.subsample import draw
from pipeline.progress import bar
from pipeline.tasks import tasks
from stages.common import run


def main(params: Params) -> None:
    sizes = params.subsample
    for task in sys.argv[1:] or params.run.tasks:
        with bar(f"subsample {task}") as progress:
            divided = tasks.get(task).with_splits(sizes.splits.get(task, "official"))
            manifest = draw(
                divided, data_root(params), seed=sizes.seed, num_train=sizes.num_train,
                num_selection=sizes.num_selection, num_evaluation=sizes.num_evaluation,
                training_answer=sizes.training_answer, prompt=sizes.prompt, progress=progress,
            )  # fmt: skip
        manifest.save(Path("data/manifests") / task / "manifest.json")


if __name__ == "__main__":
    run(main)
