"""Which trials a sweep runs, in which order, and how Tune's configuration of one leads to its request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any

from pipeline import methods
from pipeline.config.load import Params
from pipeline.config.request import TrialRequest
from pipeline.config.trial import KEY_LENGTH, Kind, TrialConfig, canonical, digest, engine_packs
from pipeline.core.errors import InputError
from pipeline.plan.inputs import Places
from pipeline.plan.space import Cell, corners, points


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

    def request_of(self, config: TrialConfig) -> TrialRequest:
        """Return where the trial and its data lie."""
        return TrialRequest(
            config=config,
            folder=str(self.places.runs / config.key),
            manifest=str(self.places.manifest(config.task)),
            source=self.params.backbone_source(config.backbone),
            cache=str(self.places.cache) if self.places.cache else None,
            pack_key=pack_key(config),
            teacher_key=teacher_key(config),
            kinds=self._kinds.get(teacher_key(config) or "", ()),
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
    if not facts.packable:
        return None
    shared = [config.backbone, config.backbone_digest, config.precision, config.engine, config.zero_stage]
    return canonical([*shared, config.world_size, facts.trains_vision, config.compile])


def teacher_key(config: TrialConfig) -> str | None:
    """Return what is equal for trials whose teacher sees the same micro-batches behind the same demonstrations."""
    if not config.trained or methods.facts(config).kind is None:
        return None
    resident = [config.backbone, config.backbone_digest, config.precision]
    batches = [config.micro_batch_size, config.accumulation, config.world_size]
    return digest([*resident, *config.draws, *batches])[:KEY_LENGTH]


def make_plan(params: Params, cells: Iterable[Cell], places: Places) -> Plan:
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
        for point in corners(cell) if asked_later else points(cell, params):
            try:
                config = cell.trial(point)
            except InputError as error:
                problems.setdefault(cell.name, error)
                continue
            if not asked_later:
                plan.trials.setdefault(config.key, config)
                plan.cell_of.setdefault(config.key, cell.name)
    if problems:
        first, *others = problems.values()
        more = f" (and {len(others)} more: {_some(list(problems)[1:])})" if others else ""
        raise InputError(first.what + more, where=first.where, way_out=first.way_out)
    return plan


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
