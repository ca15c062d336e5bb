"""The papers' claims, checked against the numbers at hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.core.plain_yaml import read_file
from pipeline.report import papers
from pipeline.report.statistics import Difference, paired_bootstrap
from pipeline.report.tables import Column, Line, ScoreLookup, Table, TableEntry, by_sample, sample_scores
from pipeline.report.writers import format_value

HOLDS, PARTLY, FAILS, OPEN = "holds", "holds in part", "does not hold", "not measured"


@dataclass(frozen=True)
class Claim:
    """One finding as a comparison of rows, or as the course of one `row` over a varied axis; see findings.yaml."""

    paper: str
    study: str
    claim: str
    above: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    metric: str | None = None
    at: Mapping[str, Any] = field(default_factory=dict)
    by: float = 0.0
    times: float | None = None
    at_most: float | None = None
    tasks: tuple[str, ...] = ()
    best_over: str | None = None
    rising: str | None = None
    rising_overall: str | None = None
    passes: str | None = None
    spread: float | None = None
    row: str | None = None
    printed: str | None = None


@dataclass(frozen=True)
class CheckedClaim:
    """What became of a claim, and the numbers behind it, one sentence a backbone and task."""

    claim: Claim
    verdict: str
    details: list[str]

    def __str__(self) -> str:
        return f"{self.verdict}: {self.claim.claim} ({self.claim.paper}, {self.claim.study})"


@functools.cache
def claims() -> tuple[Claim, ...]:
    """Return the papers' findings."""
    rows = read_file(Path(__file__).with_name("findings.yaml"))
    return tuple(_claim(row) for row in rows)


def _claim(row: dict[str, Any]) -> Claim:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Claim(**values)


def check_claims(tables: Iterable[Table], evaluations: Path) -> list[CheckedClaim]:
    """Return every claim with its verdict under the given studies.

    A claim holds where the upper row's mean over seeds is the better one on each backbone and task; whether a
    difference is clear of chance over samples is said beside it.
    """
    by_name = {table.study.study: table for table in tables}
    scores = functools.cache(lambda key: sample_scores(key, evaluations))
    return [_judge(claim, by_name.get(claim.study), scores) for claim in claims()]


def _judge(claim: Claim, table: Table | None, scores: ScoreLookup) -> CheckedClaim:
    if table is None:
        return CheckedClaim(claim, OPEN, [])
    judge = next((judge for kind, judge in _COURSES.items() if getattr(claim, kind) is not None), _comparison)
    cells = [_TaskRows(table, lines, column, scores) for _, lines in table.groups() for column in table.columns]
    judged = [result for cell in cells if _is_of(claim, cell.column) and (result := judge(claim, cell))]
    return CheckedClaim(claim, _verdict(claim, [outcome for outcome, _ in judged]), [detail for _, detail in judged])


@dataclass(frozen=True)
class _TaskRows:
    """One backbone's rows under one task's column, and the scores per sample behind them."""

    table: Table
    lines: Sequence[Line]
    column: Column
    scores: ScoreLookup

    def course(self, row: str | None) -> list[TableEntry]:
        """Return what is known of a row along its varied axis."""
        entries = [self.table.entries[line, self.column] for line in self.lines if line.row == row]
        return [entry for entry in entries if entry.value is not None]


def _is_of(claim: Claim, column: Column) -> bool:
    return column.metric == claim.metric and (not claim.tasks or column.paper_task in claim.tasks)


def _verdict(claim: Claim, outcomes: Sequence[Any]) -> str:
    if not outcomes:
        return OPEN
    if claim.best_over:  # each outcome is the point at which the row is best
        return HOLDS if len(set(outcomes)) > 1 else FAILS
    return HOLDS if all(outcomes) else PARTLY if any(outcomes) else FAILS


def _comparison(claim: Claim, cell: _TaskRows) -> tuple[bool, str] | None:
    """Whether the best of the upper rows beats the best of the lower ones, or lies below a number."""
    upper, lower = _best(cell, claim.above, claim.at), _best(cell, claim.below, claim.at)
    if upper is None:
        return None
    if lower is not None:
        return _better(upper, lower, claim), _sentence(upper, lower, cell.scores)
    if claim.at_most is None:
        return None
    return (upper.value or 0.0) < claim.at_most, f"{_task_and_backbone(upper)}: {upper.line.title} {_number(upper)}"


def _best(cell: _TaskRows, rows: Sequence[str], at: Mapping[str, Any]) -> TableEntry | None:
    entries = [
        cell.table.entries[line, cell.column]
        for line in cell.lines
        if line.row in rows and all(dict(line.vary).get(axis, value) == value for axis, value in at.items())
    ]
    return min((entry for entry in entries if entry.value is not None), key=_rank, default=None)


def _rank(entry: TableEntry) -> float:
    lower = papers.metric_facts(entry.metric).lower_is_better
    return (entry.value or 0.0) * (1 if lower else -1)


def _better(upper: TableEntry, lower: TableEntry, claim: Claim) -> bool:
    if claim.times is not None:
        return (upper.value or 0.0) >= claim.times * (lower.value or 0.0)
    return _rank(lower) - _rank(upper) >= claim.by and _rank(upper) < _rank(lower)


def _task_and_backbone(entry: TableEntry) -> str:
    return f"{papers.label('tasks', entry.column.task)} on {papers.label('backbones', entry.line.backbone)}"


def _sentence(upper: TableEntry, lower: TableEntry, scores: ScoreLookup) -> str:
    pair = " against ".join(f"{entry.line.title} {_number(entry)}" for entry in (upper, lower))
    return f"{_task_and_backbone(upper)}: {pair}{_clear(upper, lower, scores)}"


def _clear(upper: TableEntry, lower: TableEntry, scores: ScoreLookup) -> str:
    """Say whether a difference of scores is more than chance over samples."""
    gap = _gap(upper, lower, scores)
    return "" if gap is None else " (clear)" if gap.clear else " (within chance over samples)"


def _gap(upper: TableEntry, lower: TableEntry, scores: ScoreLookup) -> Difference | None:
    if upper.column.metric is not None:
        return None
    return paired_bootstrap(by_sample(upper, scores), by_sample(lower, scores))


def _number(entry: TableEntry) -> str:
    spread = f" ± {format_value(entry.std, entry.unit)}" if entry.std is not None else ""
    return format_value(entry.value or 0.0, entry.unit) + spread


def _place_of_best(claim: Claim, cell: _TaskRows) -> tuple[Any, str] | None:
    """Where along its axis a row is best, beside the paper's place."""
    known = cell.course(claim.row)
    if len(known) < 2:
        return None
    best = min(known, key=_rank)
    place = dict(best.line.vary).get(str(claim.best_over))
    printed = papers.printed_value(claim.printed, best.line.paper_backbone, str(claim.row), best.column.paper_task)
    beside = f" (paper {printed:g})" if printed is not None else ""
    return place, f"{_task_and_backbone(best)}: best at {claim.best_over} {place}{beside}"


def _spread(claim: Claim, cell: _TaskRows) -> tuple[bool, str] | None:
    """How far a row's best and worst lie apart."""
    known = cell.course(claim.row)
    if len(known) < 2:
        return None
    best, worst = min(known, key=_rank), max(known, key=_rank)
    apart = abs(_rank(worst) - _rank(best)) >= (claim.spread or 0.0)
    return apart, f"{_task_and_backbone(best)}: {_at(best)} {_number(best)} down to {_at(worst)} {_number(worst)}"


def _rise(claim: Claim, cell: _TaskRows) -> tuple[bool, str] | None:
    """Whether a row rises at each step (`rising`), or from end to end with no fall beyond chance (`rising_overall`)."""
    known = cell.course(claim.row)
    if len(known) < 2:
        return None
    falls = [(b, *_chance(b, a, cell.scores)) for a, b in pairwise(known) if _rank(b) >= _rank(a)]
    overall = _rank(known[-1]) < _rank(known[0]) and all(by_chance for _, by_chance, _ in falls)
    course = ", ".join(f"{_at(entry)} {_number(entry)}" for entry in known)
    sentence = "".join(f"; no rise to {_at(entry)} ({judged})" for entry, _, judged in falls)
    return overall if claim.rising_overall else not falls, f"{_task_and_backbone(known[0])}: {course}{sentence}"


def _passing(claim: Claim, cell: _TaskRows) -> tuple[bool, str] | None:
    """From where on its axis a row is above the best of the lower rows."""
    known, bar = cell.course(claim.row), _best(cell, claim.below, {})
    if len(known) < 2 or bar is None:
        return None
    first = next((entry for entry in known if _rank(entry) < _rank(bar)), None)
    sentence = f"from {_at(first)} on ({_number(first)})" if first else "at no size"
    return first is not None, f"{_task_and_backbone(known[0])}: {sentence}, {bar.line.title} {_number(bar)}"


# the field that makes a claim one about the course of its row
_COURSES = {
    "best_over": _place_of_best, "spread": _spread, "rising": _rise, "rising_overall": _rise, "passes": _passing,
}  # fmt: skip


def _chance(after: TableEntry, before: TableEntry, scores: ScoreLookup) -> tuple[bool, str]:
    """Return whether a difference may be chance, over samples or seeds (twice its standard error), in words too."""
    gap = _gap(after, before, scores)
    if gap is not None and not gap.clear:
        return True, "within chance over samples"
    spreads = [entry.std**2 / len(entry.done) for entry in (after, before) if entry.std is not None]
    if spreads and abs(_rank(after) - _rank(before)) <= 2 * math.sqrt(sum(spreads)):
        return True, "within chance over seeds"
    return False, "clear" if gap is not None or spreads else "one seed, no samples to judge it by"


def _at(entry: TableEntry) -> str:
    return " ".join(f"{axis} {value}" for axis, value in entry.line.vary)


def claims_markdown(claims: Sequence[CheckedClaim]) -> str:
    """Return the list as Markdown."""
    out = ["# Which of the papers' findings hold here", ""]
    for checked in claims:
        out.append(f"- **{checked.verdict}**: {checked.claim.claim} ({checked.claim.paper}, `{checked.claim.study}`)")
        out += [f"    - {detail}" for detail in checked.details]
    return "\n".join(out) + "\n"
