"""The papers' printed figures, and the names and units that the report writes things in."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import papers
from pipeline.errors import InputError, nearest
from pipeline.plain_yaml import read_file

_FIGURES = Path(papers.__file__).with_name("papers.yaml")
# a fraction and a ratio are the same number; a percentage is a hundred times it
_HUNDREDTHS = {"fraction": 1.0, "ratio": 1.0, "percent": 100.0}
_SIGNS = {"percent": "%", "times": "x", "l2": "L2"}
_DECIMALS = {"percent": 2, "ratio": 4, "fraction": 4, "count": 0}


@dataclass(frozen=True)
class Source:
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


def source(path: str | None) -> Source | None:
    """Return where `path` (such as `hificl.table1_main`) stands; None for a study without a paper.

    Raises:
        InputError: there is no such paper or table.
    """
    if path is None:
        return None
    paper, table = _find(path)
    place = table.get("source") or path.partition(".")[2].replace("figure", "Figure ").replace("table", "Table ")
    return Source(path, paper["short"], paper["title"], place, table.get("note", ""))


def figure(path: str | None, backbone: str, row: str, task: str, metric: str | None = None) -> float | None:
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
    rows = table.get("rows", {}).get(backbone, {})
    columns = table.get("columns")
    if columns is None:
        by_metric = table.get("by_metric")
        held = table.get("metric")
        if by_metric not in (None, row) or (held and metric and _match(metric, [held]) is None):
            return None
        found = rows.get(_match(metric or "", rows) or "") if by_metric else rows.get(row)
        return found[0] if found else None
    name = _match(_column(table, task, metric), columns)
    return rows[row][columns.index(name)] if name is not None and row in rows else None


def unit(path: str | None, study: str, backbone: str, task: str, metric: str | None = None) -> str | None:
    """Return the unit that the study's table prints a cell in; None: the cell's own.

    Args:
        path: the table, or None.
        study: the study's name; without a table its paper's habit holds (`hificl-figure4`: CIDEr-D as a ratio).
        backbone: the paper's backbone.
        task: the paper's task.
        metric: None for the task's own score, else the metric's name.
    """
    paper, table = _find(path) if path else (_papers().get(study.partition("-")[0], {}), {})
    units = {**paper.get("units", {}), **table.get("units", {})}
    units = {**units, **units.get(backbone, {})}
    found = units.get(_match(_column(table, task, metric), units) or "")
    return found or (metric_facts(metric).get("unit") if metric else None)


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
        return str(metric_facts(name).get("label", name))
    return str(_labels()[kind].get(name, name))


def metric_facts(metric: str) -> dict[str, Any]:
    """Return label, units and direction of a metric; case and `_` do not count."""
    known = _labels()["metrics"]
    return known.get(_match(metric, known) or "", {})


def method_look(method: str) -> tuple[str, str] | None:
    """Return a method's colour and marker; None where labels.yaml has none."""
    known = _labels()["methods"].get(method)
    return (known["colour"], known["marker"]) if known else None


def _find(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    name, _, table = path.partition(".")
    papers = _papers()
    if name not in papers:
        raise InputError(f"unknown paper '{name}'", where=f"a study's paper: {path}", way_out=nearest(name, papers))
    tables = papers[name]["tables"]
    if table in tables:
        return papers[name], tables[table]
    if table in papers[name]["without_figures"]:
        return papers[name], {}
    known = [*tables, *papers[name]["without_figures"]]
    raise InputError(f"unknown table '{table}'", where=f"a study's paper: {path}", way_out=nearest(table, known))


def _column(table: dict[str, Any], task: str, metric: str | None) -> str:
    """Return the column a cell belongs to: its task's, or its metric's where the table's columns are metrics."""
    held = table.get("metric")
    if held is None:
        return metric or task
    return task if metric is not None and _match(metric, [held]) else metric or "(the task's own score)"


def _match(name: str, known: Any) -> str | None:
    plain = name.lower().replace("_", "")
    return next((one for one in known if str(one).lower().replace("_", "") == plain), None)


@functools.cache
def _papers() -> dict[str, Any]:
    return read_file(_FIGURES)


@functools.cache
def _labels() -> dict[str, Any]:
    return read_file(Path(__file__).with_name("labels.yaml"))
