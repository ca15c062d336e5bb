"""A task's samples by params.yaml: what the stage `subsample` does for each task."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import Params, data_root
from pipeline.core.progress import bar
from pipeline.plan.inputs import places
from pipeline.tasks import tasks
from pipeline.tasks.draw import draw_manifest


def draw_task(params: Params, task: str, root: Path | None = None) -> None:
    """Draw the samples of `task` and write its manifest.

    Raises:
        InputError: files are missing, damaged or too few.
    """
    given = params.subsample
    sizes, divided = given.of(task), tasks.get(task).with_splits(given.splits.get(task, "official"))
    with bar(f"subsample {task}") as progress:
        manifest = draw_manifest(
            divided, data_root(params), seed=given.seed, num_train=sizes.num_train, num_selection=sizes.num_selection,
            num_evaluation=None if sizes.num_evaluation == "whole" else sizes.num_evaluation,
            training_answer=given.training_answer, prompt=given.prompt, progress=progress,
        )  # fmt: skip
    manifest.save(places(root).manifest(task))
