"""Which of the papers' findings hold in the numbers at hand: a plain list, computed from the studies' tables."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from pipeline.report import papers
from pipeline.report.files import shown
from pipeline.report.statistics import Difference, paired_bootstrap
from pipeline.report.tables import Column, Entry, Line, Table, by_sample, sample_scores

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
class Finding:
    """What became of a claim.

    Attributes:
        claim: the claim.
        verdict: holds, holds in part, does not hold, or not measured.
        details: the numbers behind it, one sentence a backbone and task.
    """

    claim: Claim
    verdict: str
    details: list[str]

    def __str__(self) -> str:
        return f"{self.verdict}: {self.claim.claim} ({self.claim.paper}, {self.claim.study})"


@functools.cache
def claims() -> tuple[Claim, ...]:
    """Return the papers' findings."""
    rows = yaml.safe_load(Path(__file__).with_name("findings.yaml").read_text(encoding="utf-8"))
    return tuple(_claim(row) for row in rows)


def _claim(row: dict[str, Any]) -> Claim:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Claim(**values)


def findings(tables: Iterable[Table], evaluations: Path) -> list[Finding]:
    """Return every claim with its verdict under the given studies.

    A claim holds where the upper row's mean over seeds is the better one on each backbone and task; whether a
    difference is clear of chance over samples is said beside it.
    """
    by_name = {table.study.study: table for table in tables}
    scores = functools.cache(lambda key: sample_scores(key, evaluations))
    return [_judge(claim, by_name.get(claim.study), scores) for claim in claims()]


def _judge(claim: Claim, table: Table | None, scores: Any) -> Finding:
    if table is None:
        return Finding(claim, OPEN, [])
    if claim.row is not None:
        return Finding(claim, *_along_its_axis(claim, table, scores))
    outcomes: list[bool] = []
    details: list[str] = []
    for _, lines in table.groups():
        for column in table.columns:
            if not _is_of(claim, column):
                continue
            upper = _best(table, lines, column, claim.above, claim.at)
            lower = _best(table, lines, column, claim.below, claim.at)
            if upper is None or (lower is None and claim.at_most is None):
                continue
            if lower is None:
                outcomes.append((upper.value or 0.0) < (claim.at_most or 0.0))
                details.append(f"{_where(upper)}: {upper.line.title} {_number(upper)}")
                continue
            outcomes.append(_better(upper, lower, claim))
            details.append(_sentence(upper, lower, scores))
    return Finding(claim, _verdict(outcomes), details)


def _is_of(claim: Claim, column: Column) -> bool:
    return column.metric == claim.metric and (not claim.tasks or column.paper_task in claim.tasks)


def _verdict(outcomes: Sequence[bool]) -> str:
    if not outcomes:
        return OPEN
    return HOLDS if all(outcomes) else PARTLY if any(outcomes) else FAILS


def _best(
    table: Table, lines: Sequence[Line], column: Column, rows: Sequence[str], at: Mapping[str, Any]
) -> Entry | None:
    found = [
        table.entries[line, column]
        for line in lines
        if line.row in rows and all(dict(line.vary).get(axis, value) == value for axis, value in at.items())
    ]
    known = [entry for entry in found if entry.value is not None]
    if not known:
        return None
    return min(known, key=_rank)


def _rank(entry: Entry) -> float:
    lower = papers.metric_facts(entry.metric).get("lower_is_better")
    return (entry.value or 0.0) * (1 if lower else -1)


def _better(upper: Entry, lower: Entry, claim: Claim) -> bool:
    if claim.times is not None:
        return (upper.value or 0.0) >= claim.times * (lower.value or 0.0)
    return _rank(lower) - _rank(upper) >= claim.by and _rank(upper) < _rank(lower)


def _where(entry: Entry) -> str:
    return f"{papers.label('tasks', entry.column.task)} on {papers.label('backbones', entry.line.backbone)}"


def _sentence(upper: Entry, lower: Entry, scores: Any) -> str:
    pair = " against ".join(f"{entry.line.title} {_number(entry)}" for entry in (upper, lower))
    return f"{_where(upper)}: {pair}{_clear(upper, lower, scores)}"


def _clear(upper: Entry, lower: Entry, scores: Any) -> str:
    """Say whether a difference of scores is more than chance over samples."""
    gap = _gap(upper, lower, scores)
    return "" if gap is None else " (clear)" if gap.clear else " (within chance over samples)"


def _gap(upper: Entry, lower: Entry, scores: Any) -> Difference | None:
    if upper.column.metric is not None:
        return None
    return paired_bootstrap(by_sample(upper, scores), by_sample(lower, scores))


def _number(entry: Entry) -> str:
    spread = f" ± {shown(entry.std, entry.unit)}" if entry.std is not None else ""
    return shown(entry.value or 0.0, entry.unit) + spread


def _along_its_axis(claim: Claim, table: Table, scores: Any) -> tuple[str, list[str]]:
    """Judge a claim about one row over a varied axis: where it is best, whether it rises, how far it goes apart."""
    outcomes: list[bool] = []
    details: list[str] = []
    places = set()
    for _, lines in table.groups():
        for column in table.columns:
            if not _is_of(claim, column):
                continue
            mine = [table.entries[line, column] for line in lines if line.row == claim.row]
            known = [entry for entry in mine if entry.value is not None]
            if len(known) < 2:
                continue
            if claim.best_over:
                best = min(known, key=_rank)
                places.add(dict(best.line.vary).get(claim.best_over))
                details.append(_best_at(best, claim))
            elif claim.spread is not None:
                values = [entry.value or 0.0 for entry in known]
                outcomes.append(max(values) - min(values) >= claim.spread)
                ends = (min(known, key=_rank), max(known, key=_rank))
                details.append(f"{_where(known[0])}: " + " down to ".join(f"{_at(e)} {_number(e)}" for e in ends))
            elif claim.rising or claim.rising_overall:
                falls = [(b, _chance(b, a, scores)) for a, b in pairwise(known) if _rank(b) >= _rank(a)]
                above, by_chance = _rank(known[-1]) < _rank(known[0]), all(chance for _, chance in falls)
                outcomes.append(not falls if claim.rising else above and by_chance)
                course = ", ".join(f"{_at(e)} {_number(e)}" for e in known)
                said = "".join(f"; no rise to {_at(e)} ({chance or 'clear'})" for e, chance in falls)
                details.append(f"{_where(known[0])}: {course}{said}")
            elif claim.passes:
                bar = _best(table, lines, column, claim.below, {})
                if bar is not None:
                    first = next((entry for entry in known if _rank(entry) < _rank(bar)), None)
                    outcomes.append(first is not None)
                    said = f"from {_at(first)} on ({_number(first)})" if first else "at no size"
                    details.append(f"{_where(known[0])}: {said}, {bar.line.title} {_number(bar)}")
    if claim.best_over:
        return (OPEN if not details else HOLDS if len(places) > 1 else FAILS), details
    return _verdict(outcomes), details


def _chance(after: Entry, before: Entry, scores: Any) -> str | None:
    """Say over what a difference may be chance: samples, or seeds (twice its standard error); None: it is none."""
    gap = _gap(after, before, scores)
    if gap is not None and not gap.clear:
        return "within chance over samples"
    variance = sum((entry.std or 0.0) ** 2 / len(entry.done) for entry in (after, before))
    return "within chance over seeds" if abs(_rank(after) - _rank(before)) <= 2 * math.sqrt(variance) else None


def _at(entry: Entry) -> str:
    return " ".join(f"{axis} {value}" for axis, value in entry.line.vary)


def _best_at(best: Entry, claim: Claim) -> str:
    value = dict(best.line.vary).get(str(claim.best_over))
    printed = papers.figure(claim.printed, best.line.paper_backbone, str(claim.row), best.column.paper_task)
    beside = f" (paper {printed:g})" if printed is not None else ""
    return f"{_where(best)}: best at {claim.best_over} {value}{beside}"


def to_markdown(found: Sequence[Finding]) -> str:
    """Return the list as Markdown."""
    out = ["# Which of the papers' findings hold here", ""]
    for one in found:
        out.append(f"- **{one.verdict}**: {one.claim.claim} ({one.claim.paper}, `{one.claim.study}`)")
        out += [f"    - {detail}" for detail in one.details]
    return "\n".join(out) + "\n"
