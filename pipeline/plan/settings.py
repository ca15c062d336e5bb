"""Settings laid over one another: who wins, and where each value comes from.

A setting is looked up in this order, the later one winning: the default, the method, the paper (`config.papers`), the
protocol, the profile, the study, what the user set (params.yaml, `--set`), the study's row, what the study varies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pipeline import methods
from pipeline.adapters.options import Options
from pipeline.config import papers
from pipeline.config.load import Params, Study, StudyMethod, Train, merge
from pipeline.core.errors import InputError, nearest, validate

EXPLICIT = "params.yaml"  # or --set
TRAIN_FIELDS = frozenset(Train.model_fields)
Layer = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a method is trained with.

    Attributes:
        method: its name.
        train: what all methods have.
        given: the method's own options, as the layers write them.
    """

    method: str
    train: Train = Train()
    given: Layer = field(default_factory=dict)

    @cached_property
    def options(self) -> Options:
        """The method's own options, checked once, with defaults filled in.

        Raises:
            InputError: one of them has a wrong value.
        """
        return methods.parse(self.method, self.given)

    @property
    def known(self) -> frozenset[str]:
        """The names that a layer may set."""
        return TRAIN_FIELDS | set(methods.option_names(self.method))

    def over(self, layer: Layer, where: str) -> Settings:
        """Return the same with `layer` laid over it.

        Raises:
            InputError: a name is neither a training setting nor an option of the method, or a value does not fit.
        """
        if not layer:
            return self
        options = methods.option_names(self.method)
        given, changed = dict(self.given), {}
        for name, value in _written(layer).items():
            if name in options:
                given = merge(given, {name: value})  # of a combined method's part, what is written alone changes
            elif name in TRAIN_FIELDS:
                changed[name] = value
            else:
                raise InputError(f"unknown field '{name}'", where=where, way_out=nearest(name, self.known))
        train = validate(Train, {**self.train.model_dump(), **changed}, where) if changed else self.train
        return replace(self, train=train, given=given)

    def value(self, name: str) -> Any:
        """Return a setting as a trial has it: a number where it was written as text."""
        return {**self.train.model_dump(), **self.options.plain()}[name]


@dataclass(frozen=True)
class Resolved:
    """The settings of a cell.

    Attributes:
        settings: what won.
        sources: where each setting comes from that a layer writes.
        overruled: the user's own that lost, and what they lost to.
    """

    settings: Settings
    sources: Mapping[str, str]
    overruled: Mapping[str, str]


def resolve(
    params: Params, study_name: str, row_name: str, paper_backbone: str, paper_task: str, vary: Layer
) -> Resolved:
    """Lay all that says something about a row of a study over one another.

    Raises:
        InputError: as `Settings.over`; the message names the layer.
    """
    study = params.studies[study_name]
    row = study.methods[row_name]
    settings, sources = Settings(row.method), dict[str, str]()
    for layer, source in _layers(params, study_name, study, row_name, row, paper_backbone, paper_task, vary):
        settings = settings.over(layer, f"studies.{study_name}.methods.{row_name} ({source})")
        sources.update(dict.fromkeys(_written(layer), source))
    sources |= dict.fromkeys(row.search, f"study {study_name}, search of row {row_name}")
    explicit = [name for layer in _explicit(params, row.method) for name in _written(layer)]
    return Resolved(settings, sources, {name: sources[name] for name in explicit if sources[name] != EXPLICIT})


def _layers(
    params: Params, study_name: str, study: Study, row_name: str, row: StudyMethod, paper_backbone: str,
    paper_task: str, vary: Layer,
) -> Iterator[tuple[Layer, str]]:  # fmt: skip
    """Give every layer with its name, the one that wins last."""
    yield methods.defaults(row.method), "method"
    for rule in papers.rules(study.paper, study_name, row.method, paper_backbone, paper_task, params.protocol):
        yield rule.set, rule.source
    yield params.protocols[params.protocol].train if params.protocol else {}, f"protocol {params.protocol}"
    yield params.run.train, f"profile {params.profile}"
    yield params.run.methods.get(row.method, {}), f"profile {params.profile}"
    yield study.train, f"study {study_name}"
    for layer in _explicit(params, row.method):
        yield layer, EXPLICIT
    yield row.set, f"study {study_name}, row {row_name}"
    yield vary, f"study {study_name}, vary"


def _explicit(params: Params, method: str) -> tuple[Layer, Layer]:
    return params.explicit.train, params.explicit.methods.get(method, {})


def check_methods(params: Params) -> None:
    """Check what is set for methods, those of other studies too: a misspelt one would be heard by none.

    Raises:
        InputError: as `Settings.over`.
    """
    for source, given in ((f"profile {params.profile}", params.run.methods), (EXPLICIT, params.explicit.methods)):
        for method, layer in given.items():
            Settings(method).over(layer, f"methods.{method} ({source})")


def _written(layer: Layer) -> Layer:
    """Return what a layer writes: `epochs` alone is meant for every number of samples."""
    alone = "epochs" in layer and "epochs_below_1000" not in layer
    return {**layer, "epochs_below_1000": layer["epochs"]} if alone else layer
