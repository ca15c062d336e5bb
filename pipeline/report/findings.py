"""The papers' claims, tested against the numbers at hand."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any

from pipeline.core.plain_yaml import read_file
from pipeline.core.statistics import LEVEL, Effect, holm
from pipeline.report import papers
from pipeline.report.tables import Column, Line, ScoreLookup, Table, TableEntry, contrast, score_lookup
from pipeline.report.writers import format_value

HOLDS, UNDECIDED, FAILS, OPEN = "holds", "undecided", "fails", "not measured"
SMALLEST_POINTS, SMALLEST_SHARE = 0.5, 0.01  # of a percentage; of the lower row's value, for every other unit


@dataclass(frozen=True)
class Claim:
    """One finding as a comparison of rows, or as the course of one `row` over a varied axis; see findings.yaml."""

    paper: str
    study: str
    claim: str
    above: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    not_above: bool = False
    metric: str | None = None
    at: Mapping[str, Any] = field(default_factory=dict)
    by: float | None = None
    times: float | None = None
    at_most: float | None = None
    tasks: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()
    best_over: str | None = None
    rising: str | None = None
    rising_overall: str | None = None
    passes: str | None = None
    spread: float | None = None
    row: str | None = None
    printed: str | None = None


@dataclass(frozen=True)
class CheckedClaim:
    """What became of a claim.

    Attributes:
        verdict: from an interval: HOLDS, UNDECIDED or FAILS; OPEN where nothing was measured.
        details: the numbers behind it, one sentence a backbone and task.
        odds: p after Holm's correction over all claims that were checked with it.
    """

    claim: Claim
    verdict: str
    details: list[str]
    odds: float | None = None

    @property
    def chance(self) -> str:
        """The corrected p in words; nothing where there is none."""
        return "" if self.odds is None else "p < 0.001" if self.odds < 0.001 else f"p = {self.odds:.3f}"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.claim.claim} ({self.claim.paper}, {self.claim.study})"


@dataclass(frozen=True)
class _Result:
    """What the numbers of one backbone and task (or of a backbone's tasks together) say to a claim.

    Attributes:
        true: p of the test whose alternative is that the claim is true here; 1 where no test can be made.
        false: likewise, that it is not.
        sentence: the numbers in words.
    """

    true: float
    false: float
    sentence: str


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

    A claim is about differences of at least the smallest effect of interest. It holds where the interval of each
    backbone and task lies above that, fails where one of them lies below, and else is undecided; intervals over seeds
    and samples, as wide as Holm's correction over the claims at hand asks for. One seed decides nothing.
    """
    by_name = {table.study.study: table for table in tables}
    scores = score_lookup(evaluations)
    results = [_results(claim, by_name.get(claim.study), scores) for claim in claims()]
    tested = [place for place, known in enumerate(results) if known]
    # to hold it must everywhere (the worst p), to fail it needs one place of several (Bonferroni)
    odds = [
        (_all(known.true for known in results[place]), _any(known.false for known in results[place]))
        for place in tested
    ]
    adjusted = dict(zip(tested, zip(odds, holm([min(1.0, 2 * min(pair)) for pair in odds]), strict=True), strict=True))
    checked = []
    for place, (claim, known) in enumerate(zip(claims(), results, strict=True)):
        (true, false), chance = adjusted.get(place, ((1.0, 1.0), None))
        verdict = OPEN if chance is None else UNDECIDED if chance > 1 - LEVEL else HOLDS if true < false else FAILS
        checked.append(CheckedClaim(claim, verdict, [result.sentence for result in known], chance))
    return checked


def _all(odds: Iterable[float]) -> float:
    """Return p of the test that all alternatives are true (intersection-union)."""
    return max(odds)


def _any(odds: Iterable[float]) -> float:
    """Return p of the test that some alternative is true (Bonferroni)."""
    several = list(odds)
    return min(1.0, len(several) * min(several))


@dataclass(frozen=True)
class _TaskRows:
    """One backbone's rows under one task's column, and the scores per sample behind them."""

    table: Table
    lines: Sequence[Line]
    column: Column
    scores: ScoreLookup

    def entries(self, rows: Sequence[str | None]) -> list[TableEntry]:
        """Return what is known of rows."""
        entries = [self.table.entries[line, self.column] for line in self.lines if line.row in rows]
        return [entry for entry in entries if entry.value is not None]

    def above(self, upper: TableEntry, lower: TableEntry, times: float = 1.0) -> Effect | None:
        """Return by how much one number is better than another (than so many times the other)."""
        sign = -1.0 if papers.metric_facts(upper.metric).lower_is_better else 1.0
        if sign < 0:  # so many times better is so many times less
            return contrast(((1.0, lower), (-times, upper)), self.scores)
        return contrast(((1.0, upper), (-times, lower)), self.scores)

    def smallest(self, claim: Claim, lower: TableEntry) -> float:
        """Return the least difference that the claim is about: its own, its study's or the default."""
        if claim.times is not None:
            return 0.0
        named = self.column.paper_task if self.column.metric is None else self.column.metric
        default = SMALLEST_POINTS if lower.unit == "percent" else SMALLEST_SHARE * abs(lower.value or 0.0)
        return claim.by if claim.by is not None else self.table.smallest_effect.get(named, default)

    def said(self, known: Effect | None, bound: float, unit: str, below: bool = False) -> str:
        """Return a difference (`below`: a value) with its interval, what is asked of it, and what would be seen."""
        if known is None:
            return "one measurement of each, with no error known, decides nothing"
        write = format_value if below else _signed
        asked = f"{'below' if below else 'at least' if bound else 'more than'} {format_value(bound, unit)} asked"
        if known.exact:
            return f"{write(known.mean, unit)}, without error; {asked}"
        if known.error == 0:
            return f"{write(known.mean, unit)}, with no spread to tell its error by, which decides nothing; {asked}"
        low, high = (write(end, unit) for end in known.interval())
        of = f"{known.seeds} seeds" if known.seeds > 1 else "one seed, which decides nothing"
        of += " on the same training samples" if known.seeds > 1 and self.table.same_draw else ""
        if known.samples > 1:
            of += f", {known.samples:,} samples" + f" of {known.images:,} images" * (known.images < known.samples)
        reach = format_value(bound + known.seen() * (-1 if below else 1), unit)
        return f"{write(known.mean, unit)}, 95 % interval {low} to {high} ({of}); {asked}, {reach} would be seen"


def _results(claim: Claim, table: Table | None, scores: ScoreLookup) -> list[_Result]:
    if table is None:
        return []
    judge = next((judge for kind, judge in _COURSES.items() if getattr(claim, kind) is not None), _comparison)
    out: list[_Result] = []
    for _, lines in table.groups():
        if claim.backbones and lines[0].paper_backbone not in claim.backbones:
            continue
        cells = [_TaskRows(table, lines, column, scores) for column in table.columns if _is_of(claim, column)]
        if claim.best_over:
            out += filter(None, [_crossing(claim, cells)])
        else:
            out += filter(None, [judge(claim, cell) for cell in cells])
    return out


def _is_of(claim: Claim, column: Column) -> bool:
    return column.metric == claim.metric and (not claim.tasks or column.paper_task in claim.tasks)


def _odds(known: Effect | None, bound: float) -> tuple[float, float]:
    """Return p for above and for below the bound; nothing is decided by one seed, or by scores without a spread."""
    if known is None or (not known.exact and (known.seeds == 1 or known.error == 0)):
        return 1.0, 1.0
    return known.odds_above(bound), known.odds_below(bound)


def _comparison(claim: Claim, cell: _TaskRows) -> _Result | None:
    """Whether one of the upper rows is above every lower one, or lies below a number."""
    uppers = [
        entry
        for entry in cell.entries(claim.above)
        if all(dict(entry.line.vary).get(axis, value) == value for axis, value in claim.at.items())
    ]
    lowers = cell.entries(claim.below)
    if not uppers:
        return None
    upper = min(uppers, key=_rank)
    lower = min(_same_point(lowers, upper) or lowers, key=_rank, default=None)
    if lower is None:
        return None if claim.at_most is None else _below_a_number(claim.at_most, uppers, cell)
    times = 1.0 if claim.times is None else claim.times
    odds = [
        [_odds(cell.above(a, b, times), cell.smallest(claim, b)) for b in (_same_point(lowers, a) or lowers)]
        for a in uppers
    ]
    true = _any(_all(above for above, _ in pairs) for pairs in odds)
    false = _all(_any(below for _, below in pairs) for pairs in odds)
    if claim.not_above:
        true, false = false, true
    of = f"{upper.line.title} {_number(upper)} against {lower.line.title} {_number(lower)}"
    twice = f" (the latter times {times:g})" if claim.times is not None else ""
    said = cell.said(cell.above(upper, lower, times), cell.smallest(claim, lower), upper.unit)
    return _Result(true, false, f"{_task_and_backbone(upper)}: {of}{twice}: {said}")


def _same_point(entries: Sequence[TableEntry], of: TableEntry) -> list[TableEntry]:
    """Return those at the same point of the varied axes."""
    return [entry for entry in entries if entry.line.vary == of.line.vary]


def _below_a_number(most: float, rows: Sequence[TableEntry], cell: _TaskRows) -> _Result:
    known = [contrast(((1.0, entry),), cell.scores) for entry in rows]
    odds = [_odds(value, most) for value in known]
    best = min(rows, key=_rank)
    said = cell.said(known[list(rows).index(best)], most, best.unit, below=True)
    sentence = f"{_task_and_backbone(best)}: {best.line.title} {_number(best)}: {said}"
    return _Result(_all(below for _, below in odds), _any(above for above, _ in odds), sentence)


def _rank(entry: TableEntry) -> float:
    lower = papers.metric_facts(entry.metric).lower_is_better
    return (entry.value or 0.0) * (1 if lower else -1)


def _task_and_backbone(entry: TableEntry) -> str:
    return f"{papers.label('tasks', entry.column.task)} on {papers.label('backbones', entry.line.backbone)}"


def _number(entry: TableEntry) -> str:
    spread = f" ± {format_value(entry.std, entry.unit)}" if entry.std is not None else ""
    return format_value(entry.value or 0.0, entry.unit) + spread


def _signed(value: float, unit: str) -> str:
    return ("-" if value < 0 else "+") + format_value(abs(value), unit)


def _crossing(claim: Claim, cells: Sequence[_TaskRows]) -> _Result | None:
    """Whether tasks want different values of an axis.

    It holds where of two values one is better on a task and the other on another one, each by the smallest effect; it
    fails where one value is on every task at most that much below any other. That the best values differ is no test:
    with three values and three tasks they do so in 8 of 9 cases by chance.
    """
    axis = str(claim.best_over)
    tasks = []  # by task: the best entry at each value of the axis
    for cell in cells:
        course: dict[Any, TableEntry] = {}
        for entry in sorted(cell.entries([claim.row]), key=_rank):
            course.setdefault(dict(entry.line.vary).get(axis), entry)
        if len(course) > 1:
            tasks.append((cell, course))
    values = [value for value in (tasks[0][1] if tasks else ()) if all(value in course for _, course in tasks)]
    if len(tasks) < 2 or len(values) < 2:
        return None
    odds = [
        {(a, b): _odds(cell.above(of[a], of[b]), cell.smallest(claim, of[b])) for a, b in permutations(values, 2)}
        for cell, of in tasks
    ]
    crossed = [
        max(here[a, b][0], there[b, a][0]) for a, b in combinations(values, 2) for here, there in permutations(odds, 2)
    ]
    enough = [
        _all(of_task[rival, value][1] for of_task in odds for rival in values if rival != value) for value in values
    ]
    return _Result(_any(crossed), _any(enough), "; ".join(_best_place(claim, cell, of) for cell, of in tasks))


def _best_place(claim: Claim, cell: _TaskRows, course: Mapping[Any, TableEntry]) -> str:
    best, second = sorted(course.values(), key=_rank)[:2]
    place, beside = (dict(entry.line.vary).get(str(claim.best_over)) for entry in (best, second))
    printed = papers.printed_value(claim.printed, best.line.paper_backbone, str(claim.row), best.column.paper_task)
    of_paper = f" (paper {printed:g})" if printed is not None else ""
    said = cell.said(cell.above(best, second), cell.smallest(claim, second), best.unit)
    return f"{_task_and_backbone(best)}: best at {claim.best_over} {place}{of_paper}, against {beside}: {said}"


def _spread(claim: Claim, cell: _TaskRows) -> _Result | None:
    """Whether two points of a row lie so far apart."""
    known, bound = sorted(cell.entries([claim.row]), key=_rank), claim.spread or 0.0
    if len(known) < 2:
        return None
    odds = [_odds(cell.above(a, b), bound) for a, b in permutations(known, 2)]
    best, worst = known[0], known[-1]
    course = f"{_at(best)} {_number(best)} down to {_at(worst)} {_number(worst)}"
    said = cell.said(cell.above(best, worst), bound, best.unit)
    true, false = _any(above for above, _ in odds), _all(below for _, below in odds)
    return _Result(true, false, f"{_task_and_backbone(best)}: {course}: {said}")


def _rise(claim: Claim, cell: _TaskRows) -> _Result | None:
    """Whether a row rises at each step (`rising`), or from end to end with no fall beyond error (`rising_overall`)."""
    known = cell.entries([claim.row])
    if len(known) < 2:
        return None
    first, last = known[0], known[-1]
    steps = [_odds(cell.above(b, a), cell.smallest(claim, a)) for a, b in pairwise(known)]
    falls = [_odds(cell.above(a, b), cell.smallest(claim, a))[0] for a, b in pairwise(known)]
    bound = cell.smallest(claim, first)
    end = _odds(cell.above(last, first), bound)
    if claim.rising_overall:
        fell = _any(falls)
        true, false = end[0] if fell > 1 - LEVEL else 1.0, min(1.0, 2 * min(end[1], fell))
    else:
        true, false = _all(above for above, _ in steps), _any(below for _, below in steps)
    unrisen = [b for a, b in pairwise(known) if _rank(b) >= _rank(a)]
    sentence = "".join(f"; no rise to {_at(entry)}" for entry in unrisen)
    course = ", ".join(f"{_at(entry)} {_number(entry)}" for entry in known)
    ends = cell.said(cell.above(last, first), bound, last.unit)
    return _Result(true, false, f"{_task_and_backbone(first)}: {course}{sentence}; from end to end {ends}")


def _passing(claim: Claim, cell: _TaskRows) -> _Result | None:
    """Whether a row ends above the best of the lower rows, and from where on it is, by tests from its end downwards."""
    known, lowers = cell.entries([claim.row]), cell.entries(claim.below)
    if len(known) < 2 or not lowers:
        return None
    bars = [min(_same_point(lowers, entry) or lowers, key=_rank) for entry in known]
    gaps = [cell.above(entry, bar) for entry, bar in zip(known, bars, strict=True)]
    odds = [_odds(gap, cell.smallest(claim, bar)) for gap, bar in zip(gaps, bars, strict=True)]
    first = len(known)
    while first and odds[first - 1][0] <= 1 - LEVEL:  # in this order none needs a correction for the others
        first -= 1
    place = min(first, len(known) - 1)
    sentence = (
        f"from {_at(known[place])} on ({_number(known[place])})" if first < len(known) else f"not at {_at(known[-1])}"
    )
    said = cell.said(gaps[place], cell.smallest(claim, bars[place]), known[place].unit)
    bar = f"{bars[place].line.title} {_number(bars[place])}"
    return _Result(*odds[-1], f"{_task_and_backbone(known[0])}: {sentence}, {bar}: {said}")


# the field that makes a claim one about the course of its row
_COURSES = {"spread": _spread, "rising": _rise, "rising_overall": _rise, "passes": _passing}


def _at(entry: TableEntry) -> str:
    return " ".join(f"{axis} {value}" for axis, value in entry.line.vary)


METHOD = (
    "A finding is about differences of at least the smallest effect of interest: its own, its study's "
    f"`smallest_effect`, or {SMALLEST_POINTS:g} points of a percentage and {SMALLEST_SHARE:.0%} of anything else. "
    "It holds where the interval of every backbone and task lies above that, fails where one lies below, and is else "
    "undecided. Intervals are over seeds and, by whole images, over evaluation samples; p is the whole finding's, by "
    "Holm's correction over all findings measured here, and decides at 0.05. What would be seen: in four repetitions "
    "of five, by the interval shown."
)


def claims_markdown(claims: Sequence[CheckedClaim]) -> str:
    """Return the list as Markdown."""
    out = ["# Which findings hold here", "", METHOD, ""]
    for checked in claims:
        odds = f"; {checked.chance}" if checked.chance else ""
        out.append(
            f"- **{checked.verdict}**: {checked.claim.claim} ({checked.claim.paper}, `{checked.claim.study}`{odds})"
        )
        out += [f"    - {detail}" for detail in checked.details]
    return "\n".join(out) + "\n"
