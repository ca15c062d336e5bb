"""`hificl doctor`: what a profile needs, whether it is here, and how to get what is not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, profile_name
from pipeline.core import machine
from pipeline.core.errors import HificlError, InputError
from pipeline.core.terminal import BAD, GOOD, Answer, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.config.load import Params
    from pipeline.core.plain_yaml import Json
    from pipeline.plan.space import Cell
    from pipeline.train.counting import BackboneMemory

OK, MISSING, NOTE = "ok", "missing", "note"
_STYLES = {OK: GOOD, MISSING: BAD}
_DISK_GIB = {"tiny": 1.0, "published": 5.0}  # run state, caches and MLflow; weights are looked at by themselves
_SHARED_MEMORY_GIB = 0.5  # below, Ray writes its objects to the disk


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("check", "doctor", _doctor, "data, weights, Java, GPUs, Ray, MLflow and disk", answers=True)
    profile_name(parser.add_argument("--profile", metavar="P", help="a profile (default: params.yaml's)"))


def _doctor(args: argparse.Namespace) -> Examination:
    """Examine the current folder."""
    from pipeline.config.load import load

    return examine(load(profile=args.profile), Path.cwd())


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `state` is ok, missing (the profile cannot run without it) or note."""

    name: str
    state: str
    detail: str
    way_out: str | None = None


@dataclass(frozen=True)
class Examination(Answer):
    """What a profile needs, thing by thing."""

    profile: str
    checks: list[Finding]

    def record(self) -> Json:
        """Return `profile`, `ok` and `checks`."""
        return {"profile": self.profile, "ok": self.problem is None, "checks": [asdict(check) for check in self.checks]}

    @property
    def problem(self) -> str | None:
        """What is missing."""
        bad = [check.name for check in self.checks if check.state == MISSING]
        return f"missing for profile '{self.profile}': {', '.join(bad)}" if bad else None

    def shown(self) -> Iterator[RenderableType]:
        """Give a row a check, and below what to do about those that are not in order."""
        from rich.text import Text

        made = table("checked", "state", "what was found", title=f"profile {self.profile}")
        for check in self.checks:
            made.add_row(check.name, Text(check.state, style=_STYLES.get(check.state, "")), check.detail)
        yield made
        yield ""
        yield from (f"{check.name}: {check.way_out}" for check in self.checks if check.way_out and check.state != OK)


def examine(params: Params, root: Path) -> Examination:
    """Return what the profile of `params` needs, and whether it is here."""
    checks: list[Finding] = []
    groups = (
        _python, _code, _studies, _data, _weights, _pictures, _java, _gpus, _machine, _ray, _store, _mlflow, _disk,
    )  # fmt: skip
    for group in groups:
        checks += group(params, root)
    return Examination(params.profile, checks)


def _cells(params: Params) -> list[Cell]:
    from pipeline.plan.plan import as_given
    from pipeline.plan.space import cells

    return [cell for study in params.run.studies for cell in cells(params, study, as_given(params))]


def _tried(name: str, work: Callable[[], str], way_out: str | None = None) -> Finding:
    try:
        return Finding(name, OK, work())
    except HificlError as error:
        prefix = f"{error.where}: " if error.where else ""
        return Finding(name, MISSING, prefix + error.what, ". ".join(filter(None, (error.way_out, way_out))) or None)


def _python(params: Params, root: Path) -> Iterator[Finding]:
    from pipeline.tracking.provenance import versions

    yield Finding("python", OK, f"{platform.python_version()} at {sys.executable}")
    if platform.system() != "Linux":
        yield Finding("system", NOTE, f"{platform.system()} {platform.machine()}: everything is tested on Linux alone")
    gone = [name for name, version in versions().items() if version is None and name != "deepspeed"]  # see _studies
    yield Finding("packages", MISSING if gone else OK, ", ".join(gone) or "all there", "make setup" if gone else None)


def _code(params: Params, root: Path) -> Iterator[Finding]:
    """Whether runs can name their commit, and `dvc exp` can read it."""
    from pipeline.tracking.provenance import checkout_state, code_root, refused

    checkout = code_root(root)
    code = checkout_state(checkout)
    if code.commit is None:
        yield Finding("code", NOTE, f"runs will have no commit: {code.note}")
    elif (why := refused(checkout)) is not None:
        yield Finding("code", NOTE, f"commit {code.commit[:12]}; `dvc exp` and git itself refuse it: {why}")
    else:
        yield Finding("code", OK, f"commit {code.commit[:12]}{', changed since' if code.dirty else ''}")


def _studies(params: Params, root: Path) -> Iterator[Finding]:
    """Whether the profile can give what its studies ask for, as far as params.yaml tells."""
    from pipeline.plan.plan import make_plan, places
    from pipeline.plan.unheard import unheard
    from pipeline.sweep.train import check_engines

    studies, asked = params.run.studies, _cells(params)

    def laid_out() -> str:
        trials = make_plan(params, asked, places(root)).trials
        return f"{len(trials)} trials in {', '.join(studies)}; {check_engines(trials.values())}"

    yield _tried("studies", laid_out)
    for number, line in enumerate(unheard(params, asked), start=1):
        yield Finding(f"setting {number}", NOTE, line)


def _data(params: Params, root: Path) -> Iterator[Finding]:
    from pipeline.config.load import data_root
    from pipeline.core.copies import UNWATCHED_WAY_OUT, unwatched
    from pipeline.plan.space import needed
    from pipeline.tasks import tasks

    folder = data_root(params)
    for name in needed(params, params.run.studies)[1]:
        if name not in tasks.get(name).of_name:  # a mixture, of tasks that stand here themselves
            continue
        task = tasks.get(name).with_splits(params.subsample.splits.get(name, "official"))

        def official(task: Any = task) -> str:
            files = [file for split in ("train", "evaluation") for file in task.files(folder, split)]
            return f"{len(set(files))} official files below {folder}"

        made_here = task.stands_for != task.name
        way_out = "dvc repro world" if made_here else "docs/tasks.md says where to get it and where to put it"
        finding = _tried(f"data of {name}", official, way_out)
        if made_here and finding.state == MISSING:
            finding = Finding(finding.name, NOTE, "not made yet; dvc repro makes it", "dvc repro world")
        yield finding
    if (links := unwatched(folder)) is not None:
        yield Finding("links", NOTE, links, UNWATCHED_WAY_OUT)


def _pictures(params: Params, root: Path) -> Iterator[Finding]:
    """Whether the backbones take the pictures that are drawn already."""
    from pipeline.plan.plan import places
    from pipeline.sweep.train import check_pictures, has_rules

    for backbone, task in sorted({(cell.backbone, cell.task) for cell in _cells(params) if has_rules(cell.backbone)}):
        path = places(root).manifest(task)
        if path.exists():
            yield _tried(
                f"pictures of {task} for {backbone}",
                lambda path=path, backbone=backbone: f"all {check_pictures(path, backbone)}",  # type: ignore[misc]
            )


def _weights(params: Params, root: Path) -> Iterator[Finding]:
    from pipeline import backbones
    from pipeline.plan.space import needed

    for name in needed(params, params.run.studies)[0]:
        source = params.backbone_source(name)
        yield _tried(
            f"weights of {name}",
            lambda name=name, source=source: f"{source.variant}, digest {backbones.digest_of(name, source)[:12]}",  # type: ignore[misc]
        )


def _java(params: Params, root: Path) -> Iterator[Finding]:
    from pipeline.plan.space import needed
    from pipeline.scores.java import find_java, java_version
    from pipeline.tasks import tasks

    captions = [name for name in needed(params, params.run.studies)[1] if tasks.get(name).metric == "CIDEr"]

    finding = _tried("java", lambda: f"{java_version()} at {find_java()}")
    if finding.state == MISSING and not captions:
        finding = Finding(finding.name, NOTE, f"{finding.detail} (no caption task needs it)", finding.way_out)
    yield finding


def _gpus(params: Params, root: Path) -> Iterator[Finding]:
    import torch

    count, wanted = torch.cuda.device_count(), params.sweep.gpus_per_worker
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    if wanted and not count and params.sweep.address is None:
        yield Finding("gpus", MISSING, f"none here, sweep.gpus_per_worker is {wanted:g}",
                      "Run on a machine with a GPU (docs/sweep.md), or set sweep.gpus_per_worker to 0")  # fmt: skip
    else:
        yield Finding("gpus", OK, f"{names}; {wanted:g} a worker are asked for")
    if wanted:
        from pipeline.plan.plan import planned_trials
        from pipeline.train.counting import CARDS, GIB, memory_of

        sizes = [torch.cuda.get_device_properties(i).total_memory // GIB for i in range(count)]
        cards = [int(min(sizes) * min(1.0, wanted))] if sizes else list(CARDS)
        trials = {trial.key: trial for study in params.run.studies for trial in planned_trials(params, study)}
        for of in memory_of(trials.values())[0]:
            yield _memory(of, cards)


def _memory(of: BackboneMemory, cards: Sequence[int]) -> Finding:
    """Say which methods fit cards of so many GiB; of a machine without any, those that can be had."""
    said, state, way_out = [], OK, None
    for card in cards:
        again = [
            step.method
            for step in of.steps
            if not step.trials(of.room(card)) and step.trials(of.room(card), again=True)
        ]
        never = [step.method for step in of.steps if not step.trials(of.room(card), again=True)]
        parts = [f"{', '.join(again)} with train.gradient_checkpointing alone"] * bool(again)
        parts += [f"not {', '.join(never)}"] * bool(never)
        said.append(f"{card} GiB: {'; '.join(parts) or 'all methods fit'}")
    if len(cards) == 1 and (again or never):
        state, way_out = NOTE, "Set train.gradient_checkpointing: true, train.quantize, or less train.micro_batch_size"
    detail = f"{of.backbone} {of.stored} has {of.weights / 2**30:.1f} GiB of weights; {', '.join(said)}"
    return Finding("memory", state, detail, way_out)


def _machine(params: Params, root: Path) -> Iterator[Finding]:
    """What a private cluster needs of this machine."""
    from pipeline.core import machine

    if params.sweep.address is None:
        yield from (_tried(name, check) for name, check in machine.CHECKS.items())


def _store(params: Params, root: Path) -> Iterator[Finding]:
    """Whether runs/ and evaluations/ can be written, are free and are of this version."""
    from pipeline.plan.plan import places
    from pipeline.records.evaluation import Evaluations
    from pipeline.records.store import TrialStore

    runs = places(root).runs

    def readable() -> str:
        there = next(folder for folder in (runs, *runs.parents) if folder.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(
                "cannot be written", where=str(there), way_out="Mend its permissions, or mount it writable"
            )
        store, evaluations = TrialStore(runs), Evaluations(root / "evaluations")
        trials = [(store.record(key), store.epochs(key), store.done(key)) for key in store.all_keys()]
        scores = [evaluations.read(key) for key in evaluations.scored()]
        studies = [evaluations.study(name) for name in evaluations.studies()]
        ended = sum(end is not None for *_, end in trials)
        return f"{len(trials)} trials, {ended} ended; {len(scores)} scores, {len(studies)} studies"

    yield _tried("runs", readable)
    yield from _lock("runs' lock", runs / ".lock")


def _lock(name: str, file: Path) -> Iterator[Finding]:
    from pipeline.core import locks

    if (holder := locks.holder(file)) is not None:
        yield Finding(name, NOTE, f"{file} is held by {holder}", "Wait for it to end, or stop it")


def _ray(params: Params, root: Path) -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("ray", MISSING, "not installed", "make setup")
        return

    def place() -> str:
        return params.sweep.address or f"a private cluster on this machine, its files below {machine.ray_folder()}"

    yield _tried("ray", lambda: f"{version}, {place()}")
    memory = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    if memory.is_dir():
        free = shutil.disk_usage(memory).free / 2**30
        if free < _SHARED_MEMORY_GIB:
            yield Finding("shared memory", NOTE, f"{free:.2f} GiB free in /dev/shm: Ray falls back to the disk",
                          "In a container: --shm-size=2g")  # fmt: skip


def _mlflow(params: Params, root: Path) -> Iterator[Finding]:
    from pipeline.core.copies import main_checkout
    from pipeline.tracking import store

    def address() -> str:
        given = params.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        return store.resolve_address(given, main_checkout(root))

    def reached() -> str:
        uri = address()
        file = store.sqlite_file(uri)
        if file is not None and not file.exists():  # looking must not make it
            if not os.access(file.parent, os.W_OK):
                raise InputError("the folder cannot be written", where=str(file.parent))
            return f"{store.shown(uri)} (made at the first run)"
        if file is not None and store.is_half_made(file):
            return f"{store.shown(uri)} (its making has not ended; an interrupted one begins anew at the next run)"
        store.probe(uri)
        return store.shown(uri)

    yield _tried("mlflow", reached)
    with suppress(InputError):  # said above
        if (file := store.sqlite_file(address())) is not None:
            yield from _lock("the MLflow store's lock", file.with_name(f"{file.name}.lock"))


def _disk(params: Params, root: Path) -> Iterator[Finding]:
    from pipeline import backbones
    from pipeline.plan.space import needed
    from pipeline.resident.visual_tokens import OF_THE_DISK

    free = shutil.disk_usage(root).free / 2**30
    published = any(
        params.backbone_source(name).variant == "published" and backbones.get(name).hub_id
        for name in needed(params, params.run.studies)[0]
    )
    wanted = _DISK_GIB["published" if published else "tiny"]
    tokens = _visual_gib(params) if published else 0.0
    enough = free >= wanted
    yield Finding("disk", OK if enough else MISSING, f"{free:.1f} GiB free at {root}, {wanted:g} are needed",
                  None if enough else "Free some space; `hificl gc` shows what no report refers to")  # fmt: skip
    if tokens:
        room = OF_THE_DISK * max(0.0, free - wanted)
        fits = tokens <= room
        yield Finding("visual tokens", OK if fits else NOTE,
                      f"{tokens:.0f} GiB where every image's are kept, there is room for {room:.0f}",
                      None if fits else "Those used longest ago are dropped and computed again; cache/ may be a link "
                      "to a larger disk")  # fmt: skip


def _visual_gib(params: Params) -> float:
    """Return what the visual tokens of all images take that the studies' trials see, as far as formulas tell."""
    from pipeline import backbones
    from pipeline.backbones.decoder import decoder_of
    from pipeline.cost.flops import image_cost
    from pipeline.plan.plan import drawn_samples, evaluated_samples

    wide = {(cell.backbone, cell.task): cell.train.precision == "fp32" for cell in _cells(params)}
    models: dict[str, int] = {}  # values an image
    total = 0
    for (name, task), fp32 in wide.items():
        if name not in models:
            loaded = backbones.load(name, variant="meta")
            try:
                tokens = image_cost(loaded.backbone, loaded.model).tokens
            except InputError:  # no formula for its vision tower
                tokens = 0
            models[name] = tokens * decoder_of(loaded.model).hidden_size
        total += models[name] * (4 if fp32 else 2) * (drawn_samples(params, task) + evaluated_samples(params, task))
    return total / 2**30
