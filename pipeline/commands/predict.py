"""`hificl predict`: one answer or caption of a trained adapter for one image."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine
from pipeline.core.errors import nearest
from pipeline.core.terminal import Answer, short

if TYPE_CHECKING:
    from pipeline.core.plain_yaml import Json
    from pipeline.tasks import Task


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("look", "predict", _predict, "an adapter's answer to a question about a picture", answers=True)
    parser.add_argument("--adapter", required=True, metavar="DIR", help="such as runs/KEY/adapter")
    parser.add_argument("--image", metavar="F", help="left out where the prompt has none")
    parser.add_argument("--question", metavar="Q", help="left out for a caption")
    parser.add_argument("--task", help="whose prompt is used (default: the adapter's own)")
    parser.add_argument("--max-new-tokens", type=int)


def _predict(args: argparse.Namespace) -> Predicted:
    """Answer the question of the command line."""
    return ask(
        Path(args.adapter), args.image, question=args.question, task_name=args.task,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip


@dataclass(frozen=True)
class Predicted(Answer):
    """What an adapter's backbone said to an image."""

    said: Json

    def record(self) -> Json:
        """Return all that is known of the answer."""
        return self.said

    def shown(self) -> Iterator[str]:
        """Give the answer, who gave it, and what is to be known of the question."""
        said = self.said
        yield str(said["answer"])
        yield f"\n{said['method']} on {said['backbone']}, {said['task']}, trial {short(said['trial'])}"
        if said.get("note"):
            yield f"note: {said['note']}"


def ask(
    folder: Path, image: str | Path | None, *, question: str | None = None, task_name: str | None = None,
    max_new_tokens: int | None = None,
) -> Predicted:  # fmt: skip
    """Return what the adapter's backbone says to an image, as the logged models do (`tracking.served`).

    Args:
        folder: an adapter's folder of a trial (`runs/KEY/adapter`).
        image: the image's file, or its content in base64; EXIF orientation is applied. None: the prompt has none.
        question: for tasks that ask one.
        task_name: whose prompt is used; None: the adapter's own.
        max_new_tokens: None: the task's own.

    Returns:
        What `Answerer.answer` gives, `image` and, where the miniature's world has no such question, a `note`.

    Raises:
        InputError: no adapter of a trial, no such image, a question too many or too few, or weights that are
            missing or not those that the adapter was trained on.
    """
    from pipeline.config.load import PARAMS
    from pipeline.evaluate.answerer import Answerer

    around = (parent for parent in folder.resolve().parents if (parent / PARAMS).is_file())
    answerer = Answerer(folder, project=next(around, Path()), task_name=task_name)
    said = answerer.answer(image, question, max_new_tokens)
    note = _unheard(answerer.task, question, Path("data/manifests"))
    shown = None if image is None else str(image)
    return Predicted({**said, "image": shown, **({"note": note} if note else {})})


def _unheard(task: Task, question: str | None, manifests: Path) -> str | None:
    """Return that the miniature was never asked such a question; its world has a few, and its own words for answers."""
    from pipeline.data.manifest import Manifest

    path = manifests / task.name / "manifest.json"
    if question is None or task.stands_for == task.name or not path.is_file():
        return None
    asked = {
        sample.question for samples in Manifest.load(path).splits.values() for sample in samples if sample.question
    }
    if question in asked:  # to the letter: the miniature's tokenizer knows no other spelling
        return None
    return f"{task.name} was never asked '{question}', so the answer means nothing. {nearest(question, asked)}"
