"""From a study to its cells, and from a cell and a point of its space to a `TrialConfig`."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from pipeline import backbones, methods
from pipeline.adapters.options import Facts
from pipeline.config.load import Params, Study, StudyMethod, Train
from pipeline.config.schema import SOURCE_TASK, Budget
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core.errors import InputError, nearest, require_known
from pipeline.core.plain_yaml import Json
from pipeline.plan.settings import EXPLICIT, Settings, check_methods, resolve
from pipeline.tasks import tasks

Point = Json
INSIDE = 0.381966  # of a range: no whole number by chance
TO_CHOOSE = ("selection", "num_selection_samples")  # what a method without training needs that chooses a layer
PAPERS_FULL_SIZE = 1000  # below this many samples the papers train for twice the epochs


@dataclass(frozen=True)
class Digests:
    """Content digests of what a trial starts from, by name."""

    backbones: Mapping[str, str]
    manifests: Mapping[str, str]
    train_sizes: Mapping[str, int]  # samples in each manifest's training split
    selection_sizes: Mapping[str, int] = field(default_factory=dict)  # in its selection split, where that is known


@dataclass(frozen=True)
class Cell:
    """One number of a study at one seed: what is fixed, and the space that is searched for it."""

    study: str
    row: str
    label: str
    backbone: str
    paper_backbone: str
    task: str
    paper_task: str
    vary: Point
    seed: int
    settings: Settings
    search: Json
    digests: Digests = field(repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)  # where a setting's value comes from
    overruled: Mapping[str, str] = field(default_factory=dict, repr=False)  # explicit settings, and what wins over them
    recorded: TrialConfig | None = None  # the trial, where the study's row holds it whole
    evaluation: EvaluationConfig | None = None  # and how it is scored
    source: str | None = None  # the task that it is trained on, where that is not `task`

    @property
    def source_task(self) -> str:
        """The task that it is trained on; `task` is the one that it is scored on."""
        return self.source or self.task

    @property
    def method(self) -> str:
        """The method's name."""
        return self.settings.method

    @property
    def train(self) -> Train:
        """The settings that all methods have, but for what is searched."""
        return self.settings.train

    @property
    def name(self) -> str:
        """Readable and unique within the sweep."""
        vary = "".join(f" {k}={v}" for k, v in sorted(self.vary.items()))
        return f"{self.study}/{self.backbone}/{self.task}/{self.row}{vary}/seed={self.seed}"

    def trial(self, point: Point) -> TrialConfig:
        """Return the trial at `point`; fields that the method does not use stay neutral, so that keys are shared."""
        if self.recorded is not None:
            return self.recorded
        settings = self.settings.over(point, self.name)
        self._check_pool(settings)
        train, options = self._within_selection(settings.train, point), settings.options
        if methods.is_trained(self.method):
            used = self._trained(train, settings)
        else:
            used = train.model_dump(include={"precision", "quantize", *(TO_CHOOSE if options.selects() else ())})
        if train.num_train_samples < self.digests.train_sizes[self.source_task]:
            used["sample_draw"] = train.sample_draw
        return TrialConfig.model_validate({
            **used, "backbone": self.backbone, "backbone_digest": self.digests.backbones[self.backbone],
            "task": self.source_task, "manifest_digest": self.digests.manifests[self.source_task],
            "method": self.method, "options": options.plain(), "seed": self.seed,
            "num_train_samples": train.num_train_samples,
        })  # fmt: skip

    def _trained(self, train: Train, settings: Settings) -> Json:
        """Return the fields of a trial that trains: those of the same names, and those that follow from several."""
        facts = settings.options.facts()
        full = train.num_train_samples >= PAPERS_FULL_SIZE
        same = train.model_dump(include=set(TrialConfig.model_fields) - {"num_train_samples", "sample_draw"})
        taught = {
            "demonstration_draw": train.demonstration_draw,
            "alignment_weight": _given(train.alignment_weight, facts.alignment_weight),
        }  # fmt: skip
        for name in taught:
            del same[name]  # neutral without a teacher
        if not facts.is_shown:
            del same["num_shots"]
        return {
            **same, **(taught if facts.teacher else {}), "epochs": train.epochs if full else train.epochs_below_1000,
            "ground_truth_weight": _given(train.ground_truth_weight, facts.ground_truth_weight),
            **_engine(train, facts, self.name),
        }  # fmt: skip

    def _check_pool(self, settings: Settings) -> None:
        """See that the pool holds what is asked for: it would be found out only after hours of training else."""
        train, available = settings.train, self.digests.train_sizes[self.source_task]
        pool = train.num_train_samples
        if pool > available:
            raise InputError(
                f"{pool} training samples are asked for, {self.source_task} has {available}", where=self.name,
                way_out=f"Raise subsample.num_train to {pool}, or lower num_train_samples",
            )  # fmt: skip
        facts = settings.options.facts()  # nothing is shown to those that do not train
        teacher = facts.teacher
        shots = train.num_shots if facts.is_shown else settings.options.drawn
        if teacher and train.demonstration_draw == "with-replacement":
            return
        if shots > (pool - 1 if teacher else pool):  # a training sample is never among its own demonstrations
            raise InputError(
                f"{shots} demonstrations are asked for, the pool of {self.source_task} has {pool} samples",
                where=self.name, way_out=f"Raise num_train_samples above {shots}, lower num_shots, or name the row "
                "under `without` in the profile's study_changes",
            )  # fmt: skip

    def _within_selection(self, train: Train, point: Point) -> Train:
        """Return `train` with no more samples to choose by than are drawn; what the user asks for must be there."""
        asked, drawn = train.num_selection_samples, self.digests.selection_sizes.get(self.source_task)
        if drawn is None or asked <= drawn or train.selection == "test":  # which takes the whole evaluation split
            return train
        name = "num_selection_samples"
        if name in point or name in self.vary or self.sources.get(name) == EXPLICIT:
            raise InputError(
                f"{asked} selection samples are asked for, {self.source_task} has {drawn}", where=self.name,
                way_out=f"Raise subsample.num_selection (or subsample.tasks.{self.source_task}.num_selection) to "
                f"{asked}, or lower {name}",
            )  # fmt: skip
        return train.model_copy(update={name: drawn})


def _engine(train: Train, facts: Facts, where: str) -> Json:
    """Return engine and stage of a trial: torch, whatever the stage, where one rank has nothing to share out."""
    sharded = train.zero_stage > 0 or train.offload != "none"
    if train.engine == "torch" and sharded:
        raise InputError(
            "engine torch knows neither ZeRO nor offload", where=where,
            way_out="Set train.engine to auto, or train.zero_stage to 0 and train.offload to none",
        )  # fmt: skip
    if train.engine == "deepspeed" or (train.engine == "auto" and sharded and not shares_nothing(train)):
        if train.zero_stage == 3:
            _check_zero_3(train, facts, where)
        return {"engine": "deepspeed", "zero_stage": train.zero_stage}
    return {"engine": "torch", "zero_stage": 0}


def shares_nothing(train: Train) -> bool:
    """Whether a trial has one rank, and keeps all it has on the device."""
    return train.world_size == 1 and train.offload == "none"


_NOT_SHARDED = {  # settings of `train`, and what ZeRO-3 does that they do not go with
    "compile": "parameters around each call, which torch.compile does not see",
    "gradient_checkpointing": "parameters around a layer's call, which is not made when it is computed again",
    "quantize": "parameters as numbers, which weights in 8 or 4 bits are not",
}


def _check_zero_3(train: Train, facts: Facts, where: str) -> None:
    for name, gathered in _NOT_SHARDED.items():
        without = Train.model_fields[name].default
        if getattr(train, name) != without:
            way_out = f"Set train.{name} to {str(without).lower()}, or train.zero_stage to 2"
            raise InputError(f"ZeRO-3 gathers {gathered}", where=where, way_out=way_out)
    if facts.reads_weights:
        problem = "PEFT reads the backbone's weights, of which a rank has a part at ZeRO-3"
        raise InputError(problem, where=where, way_out="Set train.zero_stage to 2, or use the method lora")


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def cells(params: Params, study_name: str, digests: Digests) -> list[Cell]:
    """Return the cells of a study under the current profile.

    Backbones and tasks of the study are the papers' names; the profile's own stand for them.

    Raises:
        InputError: unknown study, method, backbone, task, field or option.
    """
    study, pairs = _pairs(params, study_name)
    # those of other studies too: a misspelt one would be heard by none
    for name in params.backbones:
        backbones.get(name)
    for name in (*params.subsample.tasks, *params.subsample.splits):
        tasks.get(name)
    check_methods(params)
    sources = _by_part(pairs)
    every = (
        _recorded(study_name, row_name, row, row.trial, pair, digests)
        if row.trial is not None
        else _cell(params, study_name, row_name, row, pair, vary, seed, digests, sources)
        for pair in pairs
        for row_name, row in study.methods.items()
        if not study.without.get(row_name)
        if pair[1] in (row.backbones or study.backbones) and pair[3] in (row.tasks or study.tasks)
        if row.trial is None or (row.trial.backbone, row.trial.task) == (pair[0], pair[2])
        for vary in _grid(study.vary)
        if not (source := vary.get(SOURCE_TASK, row.source_task)) or _source(source, sources)  # that the profile has
        for seed in study.seeds
    )
    # a varied field that a method does not have (rank of zero-shot) would repeat its cell under other names
    unique: dict[tuple[Any, ...], Cell] = {}
    for cell in every:
        unique.setdefault((cell.row, cell.backbone, cell.task, cell.seed, str(sorted(cell.vary.items()))), cell)
    return list(unique.values())


def needed(params: Params, studies: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the profile's backbones and tasks that the studies ask for (it may name more), mixtures last.

    Raises:
        InputError: an unknown study, or one that the profile has nothing for.
    """
    names = list(studies)
    pairs = [pair for study in names for pair in _pairs(params, study)[1]]
    have = {pair[0] for pair in pairs}
    wanted = dict.fromkeys(
        [*(pair[2] for pair in pairs), *(mixture for study in names for mixture in mixtures(params, study))]
    )
    parts = {part for name in wanted for part in name.split("+")}  # a mixture is drawn from its tasks' samples
    drawn = dict.fromkeys([*(name for name in params.run.tasks if name in wanted or name in parts), *wanted])
    return [name for name in params.run.backbones if name in have], sorted(drawn, key=lambda name: "+" in name)


def mixtures(params: Params, study_name: str) -> list[str]:
    """Return the mixtures of the profile's tasks that a study trains on."""
    study = params.studies[study_name]
    sources = _by_part(_played(params, study))
    known = [_source(part, sources) for part in study.source_tasks]
    return [name for name in known if name and "+" in name]


Pair = tuple[str, str, str, str]  # a backbone, the part that it plays, a task, and the part that it plays


def _pairs(params: Params, study_name: str) -> tuple[Study, list[Pair]]:
    """Return a study, and the profile's backbones and tasks for it, each with the part that it plays."""
    require_known("study", study_name, params.studies, f"profile '{params.profile}'")
    study = params.studies[study_name]
    pairs = _played(params, study)
    if not pairs:
        raise InputError(
            f"none of the profile's backbones {params.run.backbones} and tasks {params.run.tasks} stands for one of "
            "the study's",
            where=f"studies.{study_name}",
            way_out=f"The study asks for {study.backbones} and {study.tasks}",
        )
    return study, pairs


def _played(params: Params, study: Study) -> list[Pair]:
    mixed = [name for name in study.tasks if "+" in name and {*name.split("+")} <= {*params.run.tasks}]
    return [
        (backbone, paper_backbone, task, paper_task)
        for backbone in params.run.backbones
        if (paper_backbone := _part(params, backbone, backbones.get(backbone).stands_for or backbone, study.backbones))
        for task in dict.fromkeys([*params.run.tasks, *mixed])
        if (paper_task := _part(params, task, tasks.get(task).stands_for, study.tasks))
    ]


def _by_part(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return the first of the profile's tasks that plays each part."""
    return {paper_task: task for *_, task, paper_task in reversed(pairs)}


def _part(params: Params, name: str, own: str, asked: list[str]) -> str | None:
    """Return which of a study's backbones or tasks `name` plays: its own part, or one that the profile gives it."""
    return next((part for part in (own, *params.run.stand_ins.get(name, [])) if part in asked), None)


def _cell(
    params: Params, study: str, row_name: str, row: StudyMethod, pair: Pair, vary: Point,
    seed: int, digests: Digests, tasks_by_part: Mapping[str, str],
) -> Cell:  # fmt: skip
    backbone, paper_backbone, task, paper_task = pair
    known = Settings(row.method).known
    part = vary.get(SOURCE_TASK, row.source_task) if methods.is_trained(row.method) else None
    source = _source(part, tasks_by_part) if part else None
    trained_on = {SOURCE_TASK: source} if SOURCE_TASK in vary and source else {}
    vary = {name: value for name, value in vary.items() if name in known}
    for name in row.search:
        if name not in known:
            raise InputError(
                f"search over unknown field '{name}'", where=f"studies.{study}.methods.{row_name}",
                way_out=nearest(name, known),
            )  # fmt: skip
    resolved = resolve(params, study, row_name, paper_backbone, str(part or paper_task), vary)
    return Cell(
        study=study, row=row_name, label=row.label or row_name, backbone=backbone, paper_backbone=paper_backbone,
        task=task, paper_task=paper_task, seed=seed, settings=resolved.settings, digests=digests,
        vary={name: resolved.settings.value(name) for name in vary} | trained_on,
        search={name: _distinct(domain) if isinstance(domain, list) else domain for name, domain in row.search.items()},
        sources=resolved.sources, overruled=resolved.overruled, source=source if source != task else None,
    )  # fmt: skip


def _source(source: JsonValue, tasks_by_part: Mapping[str, str]) -> str | None:
    """Return the profile's task, or mixture of tasks, that a row is trained on; None: it lacks one of them."""
    parts = str(source).split("+")
    return "+".join(tasks_by_part[part] for part in parts) if all(part in tasks_by_part for part in parts) else None


def _recorded(
    study: str, row_name: str, row: StudyMethod, trial: TrialConfig, pair: Pair, digests: Digests
) -> Cell:  # fmt: skip
    """Return the cell of a recorded trial, which has to start from what lies here.

    Raises:
        InputError: the weights or the samples are others.
    """
    for part, recorded, here in (
        (f"weights of {trial.backbone}", trial.backbone_digest, digests.backbones[trial.backbone]),
        (f"samples of {trial.task}", trial.manifest_digest, digests.manifests[trial.task]),
    ):
        if recorded != here:
            raise InputError(
                f"the {part} have digest {here[:12]}, the trial was recorded with {recorded[:12]}",
                where=f"studies.{study}.methods.{row_name}", way_out="Put back what it was trained on",
            )  # fmt: skip
    backbone, paper_backbone, task, paper_task = pair
    return Cell(
        study=study, row=row_name, label=row.label or row_name, backbone=backbone, paper_backbone=paper_backbone,
        task=task, paper_task=paper_task, vary={}, seed=trial.seed, settings=Settings(row.method, given=trial.options),
        search={}, digests=digests, recorded=trial, evaluation=row.evaluation,
    )  # fmt: skip


def _grid(axes: Mapping[str, list[JsonValue]]) -> Iterator[Point]:
    names = list(axes)
    for values in itertools.product(*(axes[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _distinct(values: list[Any]) -> list[Any]:
    """Return the values without repetitions: 1e-3 and 0.001 are one."""
    return [value for i, value in enumerate(values) if value not in values[:i]]


def points(cell: Cell, params: Params) -> list[Point]:
    """Return the points of a cell's space under grid or random search.

    Raises:
        InputError: a grid over a continuous range; or the study has a budget that the row's space does not have.
    """
    budget = params.studies[cell.study].budget if cell.recorded is None and methods.is_trained(cell.method) else None
    if budget is not None:
        return _budgeted(cell, params, budget)
    if not cell.search:
        return [{}]
    return _grid_points(cell) if params.sweep.search == "grid" else _drawn(cell, params, params.sweep.num_samples)


def _budgeted(cell: Cell, params: Params, budget: Budget) -> list[Point]:
    """Return as many points as every row of the study has, the same for each task and seed under a grid."""
    place, count = f"studies.{cell.study}.methods.{cell.row}", budget.trials
    if not cell.search:
        raise InputError(
            f"no space is named, and every row of the study has {count} trials over one", where=place,
            way_out=f"Give it a `search`, or its method a space under budget.spaces.{cell.method}",
        )  # fmt: skip
    if params.sweep.search == "optuna" and params.sweep.num_samples != count:
        way_out = f"Set sweep.num_samples to {count}"
        raise InputError(f"the study's budget is {count} trials a row", where="sweep.num_samples", way_out=way_out)
    if params.sweep.search == "optuna" and params.sweep.warm_start:
        raise InputError(
            "a row that starts from what runs/ knows of its method has more than the study's budget",
            where="sweep.warm_start", way_out="Set it to 0, or take the budget out of the study",
        )  # fmt: skip
    known = _grid_points(cell) if params.sweep.search == "grid" else _drawn(cell, params, 50 * count)[:count]
    if len(known) < count:
        raise InputError(
            f"its space has {len(known)} points, and every row of the study has {count} trials", where=place,
            way_out="Give it more values, or lower budget.trials",
        )  # fmt: skip
    chosen = random.Random(f"{params.sweep.seed}:{cell.study}:{cell.row}").sample(range(len(known)), count)
    return [known[number] for number in sorted(chosen)]


def tried(cell: Cell, params: Params, objective: Callable[[str], float | None]) -> list[Point]:
    """Return a cell's points with those that its study's `widen` adds, as far as what was trained tells.

    Args:
        cell: of a grid or random search.
        params: the project's.
        objective: what a trial is chosen by, by its key; None where it has not ended.
    """
    asked = points(cell, params)
    budget = params.studies[cell.study].budget
    for _ in range(budget.widen if budget and cell.search else 0):
        scores = [objective(cell.trial(point).key) for point in asked]
        known = [score for score in scores if score is not None]
        if len(known) < len(asked):
            break
        more = [point for point in _beyond(asked, asked[known.index(max(known))]) if _can_be(cell, point)]
        if not more:
            break
        asked = [*asked, *more]
    return asked


def _beyond(asked: Sequence[Point], best: Point) -> list[Point]:
    """Return a step further from the best point for each number that lies at an end of what was tried."""
    steps: list[Point] = []
    for name, value in best.items():
        values = sorted({number for point in asked if (number := _number(point[name])) is not None})
        end = _number(value)
        if end is None or len(values) < 2 or end not in (values[0], values[-1]):
            continue
        inside = values[1] if end == values[0] else values[-2]
        further = end * end / inside if values[0] > 0 else 2 * end - inside
        further = round(further) if isinstance(value, int) else float(f"{further:.6g}")
        steps += [{**best, name: further}] if further not in values else []
    return steps


def _number(value: JsonValue) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _can_be(cell: Cell, point: Point) -> bool:
    try:
        cell.trial(point)
    except InputError:  # such as a rank below 1
        return False
    return True


def _grid_points(cell: Cell) -> list[Point]:
    axes: dict[str, list[JsonValue]] = {}
    for name, values in cell.search.items():
        if not isinstance(values, list):
            raise InputError(
                f"a grid needs a list of values for '{name}', got {values!r}",
                where=f"studies.{cell.study}.methods.{cell.row}.search",
                way_out="Give a list, or set sweep.search to random or optuna",
            )
        axes[name] = values
    return list(_grid(axes))


def _drawn(cell: Cell, params: Params, count: int) -> list[Point]:
    generator = random.Random(f"{params.sweep.seed}:{cell.name}")
    return _distinct(
        [{name: draw(domain, generator, name) for name, domain in cell.search.items()} for _ in range(count)]
    )


def corners(cell: Cell) -> list[Point]:
    """Return points of a searched space to try beforehand: every listed value, the ends of a range and one inside.

    Each stands beside the first value of the other fields. What one of them cannot be is said before anything trains.
    """
    tried: dict[str, list[JsonValue]] = {}
    for name, domain in cell.search.items():
        if isinstance(domain, list):
            tried[name] = domain
            continue
        kind, (low, high) = parse_range(domain, name)
        tried[name] = [low, high, int((low + high) // 2) if kind == "randint" else low + (high - low) * INSIDE]
    first = {name: values[0] for name, values in tried.items() if values}
    return [{**first, name: value} for name, values in tried.items() for value in values]


def draw(domain: JsonValue, generator: random.Random, name: str) -> JsonValue:
    """Draw one value of a search domain: a list, {uniform|loguniform: [low, high]} or {randint: [low, high]}."""
    if isinstance(domain, list):
        return generator.choice(domain)
    kind, (low, high) = parse_range(domain, name)
    if kind == "loguniform":
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high) if kind == "uniform" else generator.randint(int(low), int(high))


def is_in(domain: JsonValue, value: JsonValue, name: str) -> bool:
    """Whether a value is in a search domain: one of a list, or within a range."""
    if isinstance(domain, list):
        return value in domain
    kind, (low, high) = parse_range(domain, name)
    number = _number(value)
    return number is not None and low <= number <= high and (kind != "randint" or isinstance(number, int))


def parse_range(domain: Any, name: str) -> tuple[str, tuple[float, float]]:
    """Return kind and bounds of a range in a search space.

    Raises:
        InputError: the domain is of no known form.
    """
    kinds = ("uniform", "loguniform", "randint")
    if isinstance(domain, dict) and len(domain) == 1:
        kind, bounds = next(iter(domain.items()))
        numbers = isinstance(bounds, list) and all(type(bound) in (int, float) for bound in bounds)
        if kind in kinds and numbers and len(bounds) == 2 and bounds[0] < bounds[1]:
            if kind == "loguniform" and bounds[0] <= 0:
                raise InputError(f"loguniform bounds of '{name}' must be above 0, got {bounds}", where="search")
            return kind, (bounds[0], bounds[1])
    raise InputError(
        f"search domain of '{name}' is {domain!r}",
        where="search",
        way_out=f"Give a list, or one of {kinds} with [low, high], two numbers",
    )
