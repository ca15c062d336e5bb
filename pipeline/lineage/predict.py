"""`hificl predict`: one answer or caption of a trained adapter for one image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.train.answering import Answerer


def answer(
    folder: Path, image: str | Path, *, question: str | None = None, task_name: str | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return what the adapter's backbone says to an image, as the logged models do (`tracking.served`).

    Args:
        folder: an adapter's folder of a trial (`runs/KEY/adapter`).
        image: the image's file, or its content in base64; EXIF orientation is applied.
        question: for tasks that ask one.
        task_name: whose prompt and post-processing are used; None: the adapter's own.
        max_new_tokens: None: the task's own.

    Returns:
        What `Answerer.answer` gives, and `image`.

    Raises:
        InputError: no adapter of a trial, no such image, a question too many or too few, or weights that are
            missing or not those that the adapter was trained on.
    """
    found = Answerer(folder, task_name=task_name).answer(image, question, max_new_tokens)
    return {**found, "image": str(image)}
