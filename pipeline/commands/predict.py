"""Trained adapters: `hificl predict` asks one, `serve` answers for many, `export` and `push` give one to others."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine
from pipeline.core.errors import InputError, nearest
from pipeline.core.terminal import Answer, Fields, short

if TYPE_CHECKING:
    from pipeline.adapters.base import Score
    from pipeline.core.plain_yaml import Json
    from pipeline.tasks import Task

_FORMS = ("peft", "peft-prefix", "module")  # `pipeline.adapters.peft.FORMS`, which takes seconds to import


def register(line: CommandLine) -> None:
    """Add the verbs."""
    parser = line.verb("look", "predict", _predict, "an adapter's answer to a question about a picture", answers=True)
    _of_an_adapter(parser)
    parser.add_argument("--image", metavar="F", help="left out where the prompt has none")
    parser.add_argument("--question", metavar="Q", help="left out for a caption")
    parser.add_argument("--task", help="whose prompt is used (default: the adapter's own)")
    parser.add_argument("--max-new-tokens", type=int)

    parser = line.verb("look", "export", _export, "an adapter for PEFT, or as a module by itself", answers=True)
    _of_an_adapter(parser)
    text = "peft: LoRA, or virtual tokens as a CARTRIDGE; peft-prefix: as prefix tuning; module: a file of its own"
    parser.add_argument("--to", required=True, choices=_FORMS, help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that is made")

    parser = line.verb("look", "push", _push, "an adapter with its model card to the hub", answers=True)
    _of_an_adapter(parser)
    parser.add_argument("--to", required=True, metavar="ORG/NAME", help="the repository")
    parser.add_argument("--hub", metavar="DIR", help="a folder that stands for the hub")
    parser.add_argument("--public", action="store_true", help="a repository that is made is seen by all")
    text = "OpenAI's chat completions from adapters on one backbone"
    parser = line.verb("look", "serve", _serve, text)
    parser.add_argument("--backbone", required=True, metavar="B")
    text = "a name for requests, and runs/KEY/adapter; several times"
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help=text)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--expose", action="store_true", help="listen at an address that other machines reach")
    parser.add_argument("--tokens-in", default="~/.hificl/serve", metavar="DIR", help="of tokens that are made here")
    text = "what may be loaded on request (default: this folder)"
    parser.add_argument("--adapters-under", default=".", metavar="DIR", help=text)
    parser.add_argument("--rows", type=int, default=32, help="questions in one pass")
    parser.add_argument("--waiting", type=int, default=256, help="questions that wait beside these")


def _predict(args: argparse.Namespace) -> Predicted:
    """Answer the question of the command line."""
    return ask(
        Path(args.adapter), args.image, question=args.question, task_name=args.task,
        max_new_tokens=args.max_new_tokens, backbone=args.backbone,
    )  # fmt: skip


def _serve(args: argparse.Namespace) -> None:
    """Serve until ended."""
    from importlib.util import find_spec

    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise InputError(f"{', '.join(missing)} not installed", way_out="pip install 'hificl-lab[serve]'")
    from pipeline.serve import serve

    adapters: dict[str, Path] = {}
    for given in args.adapter:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder) or name in adapters:
            problem = "this name stands twice" if name in adapters else "is no NAME=DIR"
            raise InputError(problem, where=f"--adapter {given}", way_out="Such as --adapter pets=runs/KEY/adapter")
        adapters[name] = Path(folder)
    for option in ("rows", "waiting"):
        if getattr(args, option) < 1:
            raise InputError("is below 1", where=f"--{option}", way_out="Leave it out")
    serve(
        args.backbone, adapters, host=args.host, port=args.port, exposed=args.expose,
        secrets_in=Path(args.tokens_in).expanduser(), root=Path(args.adapters_under), most_rows=args.rows,
        most_waiting=args.waiting,
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
        made = f"{said['task']}, trial {short(said['trial'])}" if said["task"] else "its own prompt"
        yield f"\n{said['method']} on {said['backbone']}, {made}"
        if said.get("note"):
            yield f"note: {said['note']}"


def ask(
    folder: Path, image: str | Path | None, *, question: str | None = None, task_name: str | None = None,
    max_new_tokens: int | None = None, backbone: str | None = None,
) -> Predicted:  # fmt: skip
    """Return what the adapter's backbone says to an image, as the logged models do (`tracking.served`).

    Args:
        folder: an adapter's folder, of a trial (`runs/KEY/adapter`) or of a wrapped model with its prompt.
        image: the image's file, or its content in base64; EXIF orientation is applied. None: the prompt has none.
        question: for tasks that ask one.
        task_name: whose prompt is used; None: the adapter's own.
        max_new_tokens: None: the task's own.
        backbone: what it was trained on, where the folder does not say.

    Returns:
        What `Answerer.answer` gives, `image` and, where the miniature's world has no such question, a `note`.

    Raises:
        InputError: no adapter of a trial, another backbone than its own, no such image, a question too many or too
            few, or weights that are missing or not those that the adapter was trained on.
    """
    from pipeline.evaluate.answerer import Answerer, project_around

    answerer = Answerer(folder, project=project_around(folder), task_name=task_name, backbone=backbone)
    _backbone(folder, backbone, answerer.config.extra)
    said = answerer.answer(image, question, max_new_tokens)
    note = answerer.task and _unheard(answerer.task, question, Path("data/manifests"))
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


def _of_an_adapter(parser: Any) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="such as runs/KEY/adapter")
    parser.add_argument("--backbone", metavar="B", help="what it was trained on, where the folder does not say")


def _backbone(folder: Path, given: str | None, extra: Json) -> str:
    """Return what an adapter was trained on: its folder says it, or the command line does.

    Raises:
        InputError: neither does, or they differ.
    """
    named = extra.get("backbone")
    if given and isinstance(named, str) and given != named:
        problem = f"the adapter in {folder} was trained on {named}"
        raise InputError(problem, where=f"--backbone {given}", way_out="Leave --backbone out")
    name = named or given
    if not isinstance(name, str):
        problem = "the adapter does not name its backbone"
        raise InputError(problem, where=str(folder), way_out="Give --backbone: a name, hub:org/name or folder:PATH")
    return name


def _export(args: argparse.Namespace) -> Fields:
    """Write the adapter's other form; no weights of the backbone are read."""
    import torch

    from pipeline import adapters, backbones
    from pipeline.adapters.peft import export
    from pipeline.evaluate.answerer import project_around, source_of

    folder, out = Path(args.adapter), Path(args.out)
    config = adapters.read_config(folder)
    name = _backbone(folder, args.backbone, config.extra)
    if out.exists() and any(out.iterdir()):
        raise InputError("is not empty", where=str(out), way_out="Give a folder that is made")
    source = source_of(name, project_around(folder))
    if source.variant == "published":
        source = source.model_copy(update={"variant": "meta"})
    model = backbones.load_from(name, source).model
    adapter = adapters.load(folder, model, torch.device("cpu"))
    exported = export(adapter, model, args.to, out)
    files = sorted(path.name for path in out.iterdir())
    return Fields(
        {
            "folder": str(out), "kind": exported.kind, "method": adapter.name, "backbone": name, "files": files,
            "exact_up_to": exported.exact_up_to,
        }
    )  # fmt: skip


def _push(args: argparse.Namespace) -> Fields:
    """Push the folder as it is, with a card of all that its trial's records say."""
    from pipeline import adapters, backbones
    from pipeline.adapters.base import card_of, push
    from pipeline.evaluate.answerer import project_around, source_of
    from pipeline.records.store import check_adapter

    folder = Path(args.adapter)
    check_adapter(folder)
    config, project = adapters.read_config(folder), project_around(folder)
    name = _backbone(folder, args.backbone, config.extra)
    source = source_of(name, project)
    base = backbones.of(name, source).hub_id or name
    card = card_of(config, base, source.revision, _facts(folder), _scores(project, config.extra.get("trial")))
    place = push(folder, args.to, card, hub=Path(args.hub) if args.hub else None, private=not args.public)
    return Fields({"place": place, "repository": args.to, "scores": len(card.scores)})


def _facts(folder: Path) -> Json:
    """Return what a trial's records say of its making; nothing of an adapter that no trial made."""
    from pipeline.records.store import TrialFolder

    trial = TrialFolder(folder.resolve().parent)
    if folder.resolve() != trial.adapter or not trial.begun:
        return {}
    record = trial.record()
    settings = {name: value for name, value in record.config.items() if name not in ("method", "options", "backbone")}
    versions = {name: record.provenance.versions.get(name) for name in ("python", "torch", "transformers", "peft")}
    return {**settings, "code": record.provenance.commit or "no commit", **{k: v for k, v in versions.items() if v}}


def _scores(project: Path, trial: object) -> list[Score]:
    """Return the trial's scores, each beside those of the same settings with other seeds."""
    from pipeline.adapters.base import Score
    from pipeline.records.evaluation import Evaluations

    evaluations = Evaluations(project / "evaluations")
    scores: dict[tuple[str, str], Score] = {}
    for name in evaluations.studies():
        cells = [cell for cell in evaluations.study(name).cells if cell.value is not None]
        for mark in (cell for cell in cells if cell.trial == trial and cell.metric and cell.unit):
            place = (mark.row, mark.backbone, mark.task, mark.vary, mark.searched, mark.metric)
            same = [
                cell for cell in cells
                if (cell.row, cell.backbone, cell.task, cell.vary, cell.searched, cell.metric) == place
            ]  # fmt: skip
            values = tuple(cell.value for cell in same if cell.value is not None)
            key = (mark.task, str(mark.metric))
            if key not in scores or len(values) > len(scores[key].values):
                scores[key] = Score(mark.task, str(mark.metric), str(mark.unit), values)
    return list(scores.values())
