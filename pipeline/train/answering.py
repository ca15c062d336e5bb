"""An adapter with its backbone, loaded once, that answers for any image: `hificl predict` and the logged models."""

from __future__ import annotations

import base64
import binascii
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline import adapters, backbones
from pipeline.adapters.base import Adapter
from pipeline.backbones.load import Loaded
from pipeline.config import PARAMS, BackboneSource, load
from pipeline.data.images import check_images, problems_error
from pipeline.data.prompt import encode_all, render, stop_strings
from pipeline.data.sample import ImageRef, Sample
from pipeline.errors import InputError
from pipeline.evaluate.generate import generate
from pipeline.tasks import tasks
from pipeline.train.visual_tokens import VisualTokens

_LONGEST_PATH = 4096  # characters; a longer text is no file's name


class Answerer:
    """Answers for images with a trial's adapter attached; weights are loaded at the first answer.

    Args:
        folder: an adapter's folder of a trial (`runs/KEY/adapter`).
        project: the folder whose params.yaml says where the weights lie.
        task_name: whose prompt and post-processing are used; None: the adapter's own.

    Raises:
        InputError: no adapter of a trial, or no such task.
    """

    def __init__(self, folder: Path, *, project: Path = Path(), task_name: str | None = None) -> None:
        self.folder, self.project = folder, project
        self.config = adapters.read_config(folder)
        self.origin: dict[str, Any] = self.config.get("extra") or {}
        if "backbone" not in self.origin:
            raise InputError(
                "the adapter does not name its backbone and task",
                where=str(folder), way_out="Give the adapter folder of a trial: runs/KEY/adapter",
            )  # fmt: skip
        self.task = tasks.get(task_name or self.origin["task"])

    def answer(
        self, image: str | Path, question: str | None = None, max_new_tokens: int | None = None
    ) -> dict[str, Any]:
        """Return what the backbone says to an image.

        Args:
            image: a file's path, or its content in base64 (a data URI too).
            question: for tasks that ask one.
            max_new_tokens: None: the task's own.

        Returns:
            `answer`, `text` (before the task's post-processing), `question`, `method`, `options`, `backbone`, `task`,
            `trial`.

        Raises:
            InputError: no such image, a question too many or too few, or weights that are missing or not those that
                the adapter was trained on.
        """
        self._check_question(question)
        with _as_file(image) as file:
            bad = [checked for checked in check_images([file]) if checked.problem is not None]
            if bad:
                raise problems_error(bad, where=str(file))
            text = self._generate(file, question, max_new_tokens or self.task.max_new_tokens)
        return {
            "answer": self.task.postprocess(text), "text": text, "question": question,
            "method": self.config["method"], "options": self.config["options"], "backbone": self.origin["backbone"],
            "task": self.task.name, "trial": self.origin.get("trial"),
        }  # fmt: skip

    def _generate(self, file: Path, question: str | None, max_new_tokens: int) -> str:
        loaded, adapter = self._loaded
        sample = Sample(
            task=self.task.name, sample_id=0, images=(ImageRef(str(file.resolve())),), question=question, target="",
            references=(),
        )  # fmt: skip
        template, style = self.task.template, self.origin.get("prompt", "papers")
        prompts = encode_all(loaded, [render(template, loaded.backbone, sample, style=style)], root="")
        with adapters.attach(loaded.model, adapter):
            (text,) = generate(
                loaded, prompts, max_new_tokens=max_new_tokens, visual_tokens=VisualTokens(loaded, None),
                stop_strings=stop_strings(template, loaded.backbone, style), from_pixels=adapter.trains_vision,
            )  # fmt: skip
        return text

    @cached_property
    def _loaded(self) -> tuple[Loaded, Adapter]:
        name = self.origin["backbone"]
        source = _source(name, self.project)
        loaded = backbones.load(
            name, variant=source.variant, weights=source.weights, revision=source.revision, dtype=source.dtype,
            device=_device(), seed=source.seed,
        )  # fmt: skip
        wanted = self.origin.get("backbone_digest", loaded.digest)
        if loaded.digest != wanted:
            raise InputError(
                f"these weights (digest {loaded.digest[:12]}) are not those of the training ({wanted[:12]})",
                where=f"backbones.{name}", way_out="Put the old weights back",
            )  # fmt: skip
        return loaded, adapters.load(self.folder, loaded.model)

    def _check_question(self, question: str | None) -> None:
        asks = self.task.template.asks
        if asks and not (question or "").strip():
            raise InputError(f"task {self.task.name} needs a question", where="--question", way_out="Give --question")
        if not asks and question is not None:
            raise InputError(
                f"task {self.task.name} has no question", where="--question", way_out="Leave --question out"
            )


@contextmanager
def _as_file(image: str | Path) -> Iterator[Path]:
    """Give an image as a file: a path as it is, base64 written out for as long as it is needed."""
    text = str(image)
    if len(text) <= _LONGEST_PATH and not text.startswith("data:") and (Path(text).exists() or "." in text):
        yield Path(text)
        return
    try:
        content = base64.b64decode(text.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise InputError(
            f"'{shown}' is neither a file nor an image in base64", where="image", way_out="Give a path or base64"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image"
        file.write_bytes(content)
        yield file


def _source(name: str, project: Path) -> BackboneSource:
    """Return where the weights lie: the project's params.yaml says it, where there is one."""
    params = project / PARAMS
    source = load(params).backbone_source(name) if params.is_file() else BackboneSource()
    return source.model_copy(update={"weights": str(project / source.weights)}) if source.weights else source


def _device() -> str:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the same sums as in the trial
    return "cuda" if torch.cuda.is_available() else "cpu"
