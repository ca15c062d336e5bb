"""Which trials a sweep runs, from which weights and manifests, in which order, and which of them are scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from pipeline import backbones, methods
from pipeline.config.load import Params, TrialRequest
from pipeline.config.trial import (
    KEY_LENGTH,
    EvaluationConfig,
    Kind,
    TrialConfig,
    canonical,
    digest,
    engine_packs,
)
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import Json
from pipeline.data.manifest import Manifest
from pipeline.plan.settings import TRAIN_FIELDS
from pipeline.plan.space import PAPERS_FULL_SIZE, Cell, Digests, Point, cells, corners, mixtures, needed, points, tried
from pipeline.records.evaluation import Candidate
from pipeline.records.store import TrialStore
from pipeline.tasks import tasks
from pipeline.tasks.vqa import VqaTask


@dataclass
class Plan:
    """The trials of one sweep.

    Attributes:
        cells: by name; a trial belongs to the first cell that asked for it.
        trials: configuration by key, of every point that is known beforehand (grid and random search).
        cell_of: cell name by trial key.
    """

    params: Params
    places: Places
    cells: dict[str, Cell] = field(default_factory=dict)
    trials: dict[str, TrialConfig] = field(default_factory=dict)
    cell_of: dict[str, str] = field(default_factory=dict)

    def request(self, tune_config: dict[str, Any]) -> TrialRequest:
        """Return what a slot needs for the trial that Tune calls `tune_config`."""
        if "trial" in tune_config:
            return self.request_of(self.trials[tune_config["trial"]])
        point = {name: value for name, value in tune_config.items() if name != "cell"}
        return self.request_of(self.cells[tune_config["cell"]].trial(point))

    def request_of(self, config: TrialConfig, evaluation: EvaluationConfig | None = None) -> TrialRequest:
        """Return where the trial and its data lie: those that it is trained on, or that an `evaluation` is of."""
        target = evaluation.task if evaluation else None
        return TrialRequest(
            config=config,
            folder=str(self.places.runs / config.key),
            manifest=str(self.places.manifest(target or config.task)),
            manifest_digest=evaluation.manifest_digest if evaluation else None,
            source=self.params.backbone_source(config.backbone),
            cache=str(self.places.cache) if self.places.cache else None,
            pack_key=pack_key(config),
            teacher_key=teacher_key(config),
            kinds=self._kinds.get(teacher_key(config) or "", ()),
            keep_seconds=self.params.sweep.checkpoint_seconds,
        )

    @cached_property
    def _kinds(self) -> dict[str, tuple[Kind, ...]]:
        """The kinds of targets that are asked for of each teacher's pass."""
        asked: dict[str, set[Kind]] = {}
        for config in self.trials.values():
            kind = methods.facts(config).kind if config.trained else None
            if kind is not None:
                asked.setdefault(teacher_key(config) or "", set()).add(kind)
        return {key: tuple(sorted(kinds)) for key, kinds in asked.items()}

    @property
    def searched(self) -> list[Cell]:
        """The cells whose points a searcher asks for, one after another."""
        return [cell for cell in self.cells.values() if self.params.sweep.search == "optuna" and cell.search]

    @property
    def examples(self) -> list[TrialConfig]:
        """Trials at the corners of the spaces that are searched so."""
        return [cell.trial(point) for cell in self.searched for point in corners(cell)]

    def open_keys(self, finished: Callable[[str], bool]) -> list[str]:
        """Return the keys of trained trials that are not done, those of one backbone, and of one teacher, together."""
        todo = [key for key, config in self.trials.items() if config.trained and not finished(key)]
        order = {key: (config.backbone, config.task, teacher_key(config) or "") for key, config in self.trials.items()}
        return sorted(todo, key=lambda key: order[key])


def pack_key(config: TrialConfig) -> str | None:
    """Return what is equal for trials that can share one forward pass; None for one that cannot share any.

    They share the resident backbone, what its vision tower is fed with, and the kind of engine.
    """
    if not config.trained or not engine_packs(config):
        return None
    facts = methods.facts(config)
    if not facts.packable or (facts.trains_vision and not backbones.get(config.backbone).family.row_a_picture):
        return None
    shared = [*config.resident, config.engine, config.zero_stage]
    if config.gradient_checkpointing:
        if facts.drops:  # a pack's own streams of dropout do not give a mask twice
            return None
        shared.append("gradient_checkpointing")
    if config.deterministic:
        shared.append("deterministic")
    return canonical([*shared, config.world_size, facts.trains_vision, config.compile])


def teacher_key(config: TrialConfig) -> str | None:
    """Return what is equal for trials whose teacher sees the same micro-batches behind the same demonstrations."""
    if not config.trained or methods.facts(config).kind is None:
        return None
    batches = [config.micro_batch_size, config.accumulation, config.world_size]
    return digest([*config.resident, *config.draws, *batches])[:KEY_LENGTH]


def make_plan(
    params: Params, cells: Iterable[Cell], places: Places, objective: Callable[[str], float | None] | None = None
) -> Plan:
    """Lay out the trials of `cells`; those that several cells share appear once.

    Raises:
        InputError: what some of them ask for cannot be had; all of them are named.
    """
    plan = Plan(params, places)
    problems: dict[str, InputError] = {}
    for cell in cells:
        plan.cells[cell.name] = cell
        asked_later = params.sweep.search == "optuna" and cell.search  # its points are asked for one after another
        if asked_later and "world_size" in cell.search:
            problems[cell.name] = InputError(
                "Optuna asks for points one after another, and slots of another number of ranks would have to be made "
                "for each", where=f"studies.{cell.study}.methods.{cell.row}.search.world_size",
                way_out="Put world_size under the study's `vary`, or set sweep.search to grid or random",
            )  # fmt: skip
            continue
        for point in _points(cell, params, bool(asked_later), objective, problems):
            try:
                config = cell.trial(point)
            except InputError as error:
                problems.setdefault(cell.name, error)
                continue
            gpus = params.sweep.gpus_per_worker
            if config.world_size > 1 and gpus != int(gpus):
                problems.setdefault(cell.name, InputError(
                    f"{config.world_size} ranks of {gpus:g} GPU each would share a card, which NCCL refuses",
                    where=cell.name, way_out="Set sweep.gpus_per_worker to 1, or train.world_size to 1",
                ))  # fmt: skip
                continue
            if not asked_later:
                plan.trials.setdefault(config.key, config)
                plan.cell_of.setdefault(config.key, cell.name)
    if problems:
        first, *others = problems.values()
        more = f" (and {len(others)} more: {_some(list(problems)[1:])})" if others else ""
        raise InputError(first.what + more, where=first.where, way_out=first.way_out)
    return plan


def _points(
    cell: Cell, params: Params, asked_later: bool, objective: Callable[[str], float | None] | None,
    problems: dict[str, InputError],
) -> list[Point]:  # fmt: skip
    try:
        if asked_later:
            if params.studies[cell.study].budget is not None:
                points(cell, params)  # refuses what the budget does not allow
            return corners(cell)
        return points(cell, params) if objective is None else tried(cell, params, objective)
    except InputError as error:
        problems.setdefault(cell.name, error)
        return []


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def in_lanes(plan: Plan, keys: Sequence[str], slots: int) -> list[str]:
    """Return `keys` as `slots` lanes taken in turn, a teacher's trials in one lane, one backbone after another.

    A slot computes a teacher's targets once and keeps them for the trials behind it (`Resident.targets`); two slots
    that took turns on one teacher would each compute them. The longest groups are placed first, each in the shortest
    lane.
    """
    by_backbone: dict[str, dict[str, list[str]]] = {}
    for key in keys:
        config = plan.trials[key]
        by_backbone.setdefault(config.backbone, {}).setdefault(teacher_key(config) or key, []).append(key)
    ordered: list[str] = []
    for groups in by_backbone.values():
        lanes: list[list[str]] = [[] for _ in range(slots)]
        for group in sorted(groups.values(), key=len, reverse=True):
            min(lanes, key=len).extend(group)
        ordered += [key for key in chain(*zip_longest(*lanes)) if key is not None]
    return ordered


def compared_groups(plan: Plan, world_size: int) -> list[list[str]]:
    """Return the trials that `sweep.early_exit` compares with each other, those of one cell and ranks, evenly cut.

    What Optuna asks for comes one after another, so nobody could tell whom to wait for.
    """
    early = plan.params.sweep.early_exit
    if not early.after or plan.searched:
        return []
    of_cell: dict[str, list[str]] = {}
    for key, cell in plan.cell_of.items():
        config = plan.trials[key]
        if plan.cells[cell].search and config.trained and config.world_size == world_size:
            of_cell.setdefault(cell, []).append(key)
    groups = []
    for keys in of_cell.values():
        count = -(-len(keys) // early.group)
        groups += [keys[i * len(keys) // count : (i + 1) * len(keys) // count] for i in range(count)]
    return [group for group in groups if len(group) > 1]


def side_by_side(order: Sequence[str], groups: Sequence[Sequence[str]]) -> list[str]:
    """Return `order` with the trials of each group one after another, where its first one stands.

    So of the trials that Tune has in progress, at most one group's are not all there.
    """
    group_of = {key: number for number, group in enumerate(groups) for key in group}
    places: dict[int | str, list[str]] = {}  # a group's, or a trial's own
    for key in order:
        places.setdefault(group_of.get(key, key), []).append(key)
    return [key for together in places.values() for key in together]


@dataclass(frozen=True)
class Choice:
    """The trial of the candidates that a cell is scored with, its point of the row's search, or why there is none.

    Attributes:
        halted: whether there is none because a trial was stopped by hand.
    """

    candidates: tuple[Candidate, ...]
    trial: str | None
    searched: Point
    error: str | None
    halted: bool = False


def candidates(params: Params, cell: Cell, store: TrialStore) -> list[tuple[Point, TrialConfig]]:
    """Return the points of a cell with their trials; under Optuna, those that the store holds."""
    if params.sweep.search != "optuna" or not cell.search:
        return [(point, cell.trial(point)) for point in tried(cell, params, store.objective)]
    asked = []
    for key in store.all_keys():
        config = store.config(key)
        values = {**config.model_dump(), **config.options}
        point = {name: values[name] for name in cell.search if name in values}
        if len(point) == len(cell.search) and config.method == cell.method and cell.trial(point).key == key:
            asked.append((point, config))
    return asked


def choose(params: Params, cell: Cell, store: TrialStore) -> Choice:
    """Return the cell's candidates and the one with the best objective on the selection set."""
    rows, problem, halted = [], None, False
    best, best_objective = None, float("-inf")
    for point, config in candidates(params, cell, store):
        end = store.done(config.key)
        objective = end.objective if end else None
        status = end.status if end else "missing"
        row = Candidate(trial=config.key, searched=point, selection_score=objective, status=status)
        rows.append(row)
        if not (end and end.final) and store.halted(config.key):
            halted = True  # its number would stand beside those of whole trainings
            problem = problem or f"trial {config.key} was stopped by hand; `hificl resume {config.key}` lets it go on"
        elif end is None or not (end.status == "finished" or (end.status == "stopped" and end.epochs)):
            problem = problem or (end.error if end else None) or f"trial {config.key} is {status}"
        elif best is None or (objective is not None and objective > best_objective):
            best, best_objective = row, objective if objective is not None else float("-inf")
    if best is None:
        return Choice(tuple(rows), None, {}, problem or "no trial", halted)
    return Choice(tuple(rows), best.trial, dict(best.searched), None)


def evaluation_of(params: Params, cell: Cell, trial: str) -> EvaluationConfig:
    """Return how the trial of a cell is scored."""
    if cell.evaluation is not None:
        return cell.evaluation.model_copy(update={"trial": trial})
    settings, published, task = params.evaluate, methods.published_decoding(cell.method), tasks.get(cell.task)
    given = {name: getattr(settings.generation, name) for name in ("num_beams", "length_penalty", "max_new_tokens")}
    decoding = {name: getattr(published, name) if value == "published" else value for name, value in given.items()}
    decoding["max_new_tokens"] = decoding["max_new_tokens"] or task.max_new_tokens
    target = {"task": cell.task, "manifest_digest": cell.digests.manifests[cell.task]} if cell.source else {}
    return EvaluationConfig(
        trial=trial, **target, **decoding, num_samples=settings.num_evaluation_samples,
        vqa_normalise=settings.vqa_normalise, drop_incomplete_batch=settings.drop_incomplete_batch,
        stem_predictions=settings.stem_predictions and isinstance(task, VqaTask) and task.stemmed_references,
    )  # fmt: skip


WHOLE_SPLIT = 10_000  # stands for a split that is evaluated whole, whose size only its files tell
_AS_GIVEN = "not read: a forecast needs no weights and no data"


@dataclass(frozen=True)
class Places:
    """Where things lie on this machine; every path absolute."""

    runs: Path
    manifests: Path
    cache: Path | None

    def manifest(self, task: str) -> Path:
        """Return the path of a task's manifest."""
        return self.manifests / task / "manifest.json"


def places(root: Path | None = None) -> Places:
    """Return where the project below `root` (default: the current folder) keeps things."""
    root = (root or Path.cwd()).resolve()
    return Places(runs=root / "runs", manifests=root / "data/manifests", cache=root / "cache/visual")


class Inputs:
    """What trials start from: weights and manifests, each read once for all studies that ask for it."""

    def __init__(self, params: Params, where: Places) -> None:
        self.params, self.where = params, where
        self._backbone, self._manifest = functools.cache(self._read_backbone), functools.cache(self._read_manifest)

    def digests(self, studies: Iterable[str]) -> Digests:
        """Return the digests of the backbones and manifests that studies need.

        Raises:
            InputError: weights or a manifest are missing.
        """
        names, tasks = needed(self.params, studies)
        manifests = {task: self._manifest(task) for task in tasks}
        return Digests(
            backbones={name: self._backbone(name) for name in names},
            manifests={task: digest for task, (digest, _) in manifests.items()},
            train_sizes={task: sizes["train"] for task, (_, sizes) in manifests.items()},
            selection_sizes={task: sizes["selection"] for task, (_, sizes) in manifests.items()},
        )

    def _read_backbone(self, name: str) -> str:
        return backbones.digest_of(name, self.params.backbone_source(name))

    def _read_manifest(self, task: str) -> tuple[str, Mapping[str, int]]:
        """Return its digest, and how many samples each split has."""
        path = self.where.manifest(task)
        if not path.exists():
            raise InputError("no manifest", where=str(path), way_out=f"Run `python -m stages.subsample {task}` first")
        manifest = Manifest.load(path)
        if manifest.definition is not None and manifest.definition != tasks.get(task).definition:
            way_out = "Draw it again: dvc repro subsample"
            raise InputError(f"was drawn when tasks.{task} was another", where=str(path), way_out=way_out)
        return manifest.digest, manifest.sizes


def all_cells(params: Params, studies: list[str], where: Places) -> list[Cell]:
    """Return the cells of several studies, in their order."""
    known = Inputs(params, where).digests(studies)
    return [cell for study in studies for cell in cells(params, study, known)]


def evaluated_samples(params: Params, task: str) -> int:
    """Return how many samples of a task are scored, as far as params.yaml and the official split's size tell."""
    whole = tasks.get(task).official_evaluation or WHOLE_SPLIT
    drawn = params.subsample.of(task).num_evaluation
    return min(params.evaluate.num_evaluation_samples or whole, whole if drawn == "whole" else drawn)


def drawn_samples(params: Params, task: str) -> int:
    """Return how many samples are drawn to train and to choose by."""
    sizes = params.subsample.of(task)
    return sizes.num_train + sizes.num_selection


def as_given(params: Params) -> Digests:
    """Return what stands for digests where nothing is read: the sizes that params.yaml asks for."""
    names = dict.fromkeys([*params.run.tasks, *(name for study in params.studies for name in mixtures(params, study))])
    return Digests(
        backbones=dict.fromkeys(params.run.backbones, _AS_GIVEN),
        manifests=dict.fromkeys(names, _AS_GIVEN),
        train_sizes={task: params.subsample.of(task).num_train for task in names},
        selection_sizes={task: params.subsample.of(task).num_selection for task in names},
    )


def planned_trials(params: Params, study: str) -> list[TrialConfig]:
    """Return the trials of a study, each once, with nothing read from disk."""
    digests = as_given(params)
    planned = (cell.trial(point) for cell in cells(params, study, digests) for point in points(cell, params))
    return list({trial.key: trial for trial in planned}.values())


_DIGESTS = {"backbone_digest", "manifest_digest"}


@dataclass(frozen=True)
class TrialRow:
    """One trial of one study, as it would be trained and scored.

    Attributes:
        row: the study's row.
        vary: the point of the study's axes.
        searched: the point of the row's search; of a search that asks for its points one after another, an example.
        trial: its configuration.
        num_shots: demonstrations that a teacher sees, or that the method itself draws for a prompt.
        num_evaluation: samples that it is scored on.
        key: the trial's key; None where weights or data are not here, which it hangs on.
        done: whether it is trained (or needs no training) and in the store.
        sources: where each setting comes from: train (the default), method, a paper's table or section, profile,
            study, or params.yaml.
    """

    study: str
    row: str
    vary: Point
    searched: Point
    trial: TrialConfig
    num_shots: int
    num_evaluation: int
    key: str | None
    done: bool
    sources: dict[str, str]

    def record(self) -> Json:
        """Return all settings of the trial, and what is known of it beside them."""
        return {
            "study": self.study, "row": self.row, "vary": self.vary, "searched": self.searched,
            **self.trial.model_dump(mode="json", exclude=_DIGESTS), "num_shots": self.num_shots,
            "num_evaluation": self.num_evaluation, "key": self.key, "done": self.done, "sources": self.sources,
        }  # fmt: skip


def trial_rows(
    params: Params, studies: Sequence[str], where: Places, finished: Callable[[str], bool]
) -> list[TrialRow]:
    """Return every trial of the studies under the profile; of points that a searcher asks for, examples.

    Nothing is read but params.yaml where weights or manifests are missing: no trial is known to be done then.

    Args:
        params: the project's.
        studies: their names.
        where: the project's places.
        finished: whether the store has the trial of a key.

    Raises:
        InputError: an unknown study, field or option, or settings that no trial can have.
    """
    known = _digests(params, studies, where)
    return [
        row
        for study in studies
        for cell in cells(params, study, known or as_given(params))
        for row in _rows(params, cell, finished if known else None)
    ]


def _digests(params: Params, studies: Sequence[str], where: Places) -> Digests | None:
    try:
        return Inputs(params, where).digests(studies)
    except InputError:  # no weights, or nothing drawn
        return None


def _rows(params: Params, cell: Cell, finished: Callable[[str], bool] | None) -> Iterator[TrialRow]:
    asked_later = params.sweep.search == "optuna" and cell.search
    for point in corners(cell) if asked_later else points(cell, params):
        trial = cell.trial(point)
        yield TrialRow(
            study=cell.study, row=cell.row, vary=cell.vary, searched=point, trial=trial,
            num_shots=trial.num_shots or methods.options(trial).drawn,
            num_evaluation=evaluated_samples(params, cell.task), key=trial.key if finished else None,
            done=finished is not None and finished(trial.key), sources=_sources(cell, trial),
        )  # fmt: skip


def _sources(cell: Cell, trial: TrialConfig) -> dict[str, str]:
    """Return where each setting that the trial uses comes from."""
    fields = [name for name in TrialConfig.model_fields if name in TRAIN_FIELDS]
    default = dict.fromkeys(fields, "train") | dict.fromkeys(trial.options, "method")
    below = "epochs_below_1000" if trial.num_train_samples < PAPERS_FULL_SIZE else "epochs"
    asked = {**{name: name for name in default}, "epochs": below}
    won = {name: cell.sources[setting] for name, setting in asked.items() if setting in cell.sources}
    chosen_on = "num_selection_samples"
    if chosen_on not in cell.search and 0 < trial.num_selection_samples < cell.train.num_selection_samples:
        won[chosen_on] = "subsample.num_selection, which is less"
    return {**default, **won}
