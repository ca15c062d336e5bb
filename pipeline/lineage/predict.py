"""`hificl predict`: one answer or caption of a trained adapter for one image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline import adapters, backbones
from pipeline.config import PARAMS, BackboneSource, load
from pipeline.data.images import check_images, problems_error
from pipeline.data.prompt import encode_all, render, stop_strings
from pipeline.data.sample import ImageRef, Sample
from pipeline.errors import InputError
from pipeline.evaluate.generate import generate
from pipeline.tasks import tasks
from pipeline.tasks.base import Task
from pipeline.train.visual_tokens import VisualTokens


def answer(
    folder: Path, image: Path, *, question: str | None = None, task_name: str | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return what the adapter's backbone says to an image, with the adapter attached.

    Args:
        folder: an adapter's folder of a trial (`runs/KEY/adapter`).
        image: the image's file.
        question: for tasks that ask one.
        task_name: whose prompt and post-processing are used; None: the adapter's own.
        max_new_tokens: None: the task's own.

    Returns:
        `answer`, `text` (before the task's post-processing), `method`, `options`, `backbone`, `task`, `trial`.

    Raises:
        InputError: no adapter of a trial, no such image, a question too many or too few, or weights that are
            missing or not those that the adapter was trained on.
    """
    config = adapters.read_config(folder)
    extra = config.get("extra") or {}
    if "backbone" not in extra:
        raise InputError(
            "the adapter does not name its backbone and task",
            where=str(folder), way_out="Give the adapter folder of a trial: runs/KEY/adapter",
        )  # fmt: skip
    task = tasks.get(task_name or extra["task"])
    _check_question(task, question)
    bad = [checked for checked in check_images([image]) if checked.problem is not None]
    if bad:
        raise problems_error(bad, where=str(image))
    name = extra["backbone"]
    source = _source(name)
    loaded = backbones.load(
        name, variant=source.variant, weights=source.weights, revision=source.revision, dtype=source.dtype,
        device=_device(), seed=source.seed,
    )  # fmt: skip
    if loaded.digest != extra.get("backbone_digest", loaded.digest):
        raise InputError(
            f"these weights (digest {loaded.digest[:12]}) are not those of the training "
            f"({extra['backbone_digest'][:12]})",
            where=f"backbones.{name}", way_out="Put the old weights back",
        )  # fmt: skip
    adapter = adapters.load(folder, loaded.model)
    sample = Sample(
        task=task.name, sample_id=0, images=(ImageRef(str(image.resolve())),), question=question, target="",
        references=(),
    )  # fmt: skip
    style = extra.get("prompt", "papers")
    prompts = encode_all(loaded, [render(task.template, loaded.backbone, sample, style=style)], root="")
    with adapters.attach(loaded.model, adapter):
        (text,) = generate(
            loaded, prompts, max_new_tokens=max_new_tokens or task.max_new_tokens,
            visual_tokens=VisualTokens(loaded, None), stop_strings=stop_strings(task.template, loaded.backbone, style),
            from_pixels=adapter.trains_vision,
        )  # fmt: skip
    return {
        "answer": task.postprocess(text), "text": text, "question": question, "image": str(image),
        "method": config["method"], "options": config["options"], "backbone": name, "task": task.name,
        "trial": extra.get("trial"),
    }  # fmt: skip


def _check_question(task: Task, question: str | None) -> None:
    asks = "{question}" in task.template.query
    if asks and not (question or "").strip():
        raise InputError(f"task {task.name} needs a question", where="--question", way_out="Give --question")
    if not asks and question is not None:
        raise InputError(f"task {task.name} has no question", where="--question", way_out="Leave --question out")


def _source(name: str) -> BackboneSource:
    """Return where the weights lie: params.yaml of this folder says it, where there is one."""
    return load(PARAMS).backbone_source(name) if Path(PARAMS).is_file() else BackboneSource()


def _device() -> str:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the same sums as in the trial
    return "cuda" if torch.cuda.is_available() else "cpu"
