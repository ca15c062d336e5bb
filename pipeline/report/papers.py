"""The papers' printed figures, and the names and units that the report writes things in."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.config import papers
from pipeline.core.errors import InputError, nearest, require_known
from pipeline.core.plain_yaml import read_file

_FIGURES = Path(papers.__file__).with_name("papers.yaml")
# a fraction and a ratio are the same number; a percentage is a hundred times it
_HUNDREDTHS = {"fraction": 1.0, "ratio": 1.0, "percent": 100.0}
_SIGNS = {"percent": "%", "times": "x", "l2": "L2"}
_DECIMALS = {"percent": 2, "ratio": 4, "fraction": 4, "count": 0}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metric(_Frozen):
    """How a metric is written.

    Attributes:
        label: its name; None: as the metric calls itself.
        unit: that the papers print it in.
        measured_in: the unit that it is measured in.
        lower_is_better: as for a loss or a time.
        ranked: one value is better than another; else no best one is marked.
        counted: without error, as FLOPs and an allocator's bytes are: one number says all.
    """

    label: str | None = None
    unit: str | None = None
    measured_in: str | None = None
    lower_is_better: bool = False
    ranked: bool = True
    counted: bool = False


class MethodLook(_Frozen):
    """A method's colour and Matplotlib's sign for its marker."""

    colour: str
    marker: str


class _Labels(_Frozen):
    """labels.yaml: how names are written."""

    tasks: Mapping[str, str]
    backbones: Mapping[str, str]
    axes: Mapping[str, str]
    metrics: Mapping[str, Metric]
    methods: Mapping[str, MethodLook]


class _Printed(_Frozen):
    """One table of papers.yaml; what its fields mean is written at the top of that file."""

    source: str | None = None
    note: str = ""
    metric: str | None = None
    by_metric: str | None = None
    units: Mapping[str, str | Mapping[str, str]] = {}
    columns: tuple[str, ...] | None = None
    rows: Mapping[str, Mapping[str, tuple[int | float | None, ...]]] = {}


class _Paper(_Frozen):
    title: str
    short: str
    units: Mapping[str, str] = {}
    tables: Mapping[str, _Printed]
    without_figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """Where a study's figures stand in a paper.

    Attributes:
        path: as in params.yaml (`hificl.table1_main`).
        paper: the paper's short name.
        title: its full title.
        place: table or figure ("Table 1"); empty where the paper prints no numbers.
        note: what has to be known of the table, or empty.
    """

    path: str
    paper: str
    title: str
    place: str
    note: str


def paper_table(path: str | None) -> PaperTable | None:
    """Return where `path` (such as `hificl.table1_main`) stands; None for a study without a paper.

    Raises:
        InputError: there is no such paper or table.
    """
    if path is None:
        return None
    paper, table = _find(path)
    place = table.source or path.partition(".")[2].replace("figure", "Figure ").replace("table", "Table ")
    return PaperTable(path, paper.short, paper.title, place, table.note)


def printed_value(path: str | None, backbone: str, row: str, task: str, metric: str | None = None) -> float | None:
    """Return the printed figure of a cell in the unit of `unit()`; None where the paper prints none.

    Args:
        path: the table, such as `hificl.table1_main`.
        backbone: the paper's backbone.
        row: the paper's row, such as `lora-r16`.
        task: the paper's task.
        metric: None for the task's own score, else the metric's name; case and `_` do not count.
    """
    if path is None:
        return None
    table = _find(path)[1]
    rows = table.rows.get(backbone, {})
    if table.columns is None:
        if table.by_metric not in (None, row) or (table.metric and metric and not _match(metric, [table.metric])):
            return None
        values = rows.get(_match(metric or "", rows) or "" if table.by_metric else row)
        return values[0] if values else None
    name = _match(_column(table, task, metric), table.columns)
    return rows[row][table.columns.index(name)] if name is not None and row in rows else None


def unit(path: str | None, study: str, backbone: str, task: str, metric: str | None = None) -> str | None:
    """Return the unit that the study's table prints a cell in; None: the cell's own.

    Args:
        path: the table, or None.
        study: the study's name; without a table its paper's habit holds (`hificl-figure4`: CIDEr-D as a ratio).
        backbone: the paper's backbone.
        task: the paper's task.
        metric: None for the task's own score, else the metric's name.
    """
    paper, table = _find(path) if path else (_papers().get(study.partition("-")[0]), _Printed())
    units = {**(paper.units if paper else {}), **table.units}
    of_backbone = units.get(backbone)
    units = {**units, **of_backbone} if isinstance(of_backbone, Mapping) else units
    name = units.get(_match(_column(table, task, metric), units) or "")
    return name if isinstance(name, str) else metric_facts(metric).unit if metric else None


def convert(value: float, unit_from: str, unit_to: str | None) -> float:
    """Return `value` in another unit; units that are no parts of one whole stay as they are."""
    if unit_to is None or unit_from not in _HUNDREDTHS or unit_to not in _HUNDREDTHS:
        return value
    return value * (_HUNDREDTHS[unit_to] / _HUNDREDTHS[unit_from])


def decimals(unit_name: str) -> int:
    """Return with how many decimals the papers print a unit."""
    return _DECIMALS.get(unit_name, 2)


def sign(unit_name: str) -> str:
    """Return the sign that a unit is written with."""
    return _SIGNS.get(unit_name, "")


def label(kind: str, name: str) -> str:
    """Return how a name is written: `kind` is tasks, backbones, metrics or axes."""
    if kind == "metrics":
        return metric_facts(name).label or name
    labels = _labels()
    names = {"tasks": labels.tasks, "backbones": labels.backbones, "axes": labels.axes}[kind]
    return names.get(name, name)


def metric_facts(metric: str) -> Metric:
    """Return label, units and direction of a metric; case and `_` do not count."""
    known = _labels().metrics
    return known.get(_match(metric, known) or "", Metric())


def method_look(method: str) -> MethodLook | None:
    """Return a method's colour and marker; None where labels.yaml has none."""
    return _labels().methods.get(method)


def _find(path: str) -> tuple[_Paper, _Printed]:
    name, _, table = path.partition(".")
    papers = _papers()
    require_known("paper", name, papers, f"a study's paper: {path}")
    paper = papers[name]
    if table in paper.tables:
        return paper, paper.tables[table]
    if table in paper.without_figures:
        return paper, _Printed()
    known = [*paper.tables, *paper.without_figures]
    raise InputError(f"unknown table '{table}'", where=f"a study's paper: {path}", way_out=nearest(table, known))


def _column(table: _Printed, task: str, metric: str | None) -> str:
    """Return the column a cell belongs to: its task's, or its metric's where the table's columns are metrics."""
    if table.metric is None:
        return metric or task
    return task if metric is not None and _match(metric, [table.metric]) else metric or "(the task's own score)"


def _match(name: str, known: Iterable[str]) -> str | None:
    plain = name.lower().replace("_", "")
    return next((candidate for candidate in known if candidate.lower().replace("_", "") == plain), None)


@functools.cache
def _papers() -> Mapping[str, _Paper]:
    return {name: _Paper.model_validate(paper) for name, paper in read_file(_FIGURES).items()}


@functools.cache
def _labels() -> _Labels:
    return _Labels.model_validate(read_file(Path(__file__).with_name("labels.yaml")))
