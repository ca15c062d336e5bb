"""A study's cells as the papers lay them out: averaged over seeds, in the table's unit, marked, with costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pipeline.config.load import Params
from pipeline.records.evaluation import CellResult, Evaluations, StudyFile
from pipeline.report import papers
from pipeline.report.statistics import Difference, interval, mean_std, paired_bootstrap

_TOLERANCE = 1e-3  # relative: a score that differs more from its samples' mean is no mean over samples


class SampleScores(NamedTuple):
    """One evaluation's score of each sample, by id, and the unit of these scores."""

    unit: str
    by_sample: dict[str, float]


ScoreLookup = Callable[[str], SampleScores]  # `sample_scores` of an evaluation's key, remembered by the caller


@dataclass(frozen=True)
class Line:
    """One row of a table: a method on a backbone at one point of the varied axes."""

    backbone: str
    paper_backbone: str
    row: str
    label: str
    vary: tuple[tuple[str, Any], ...]

    @property
    def method(self) -> str:
        """The row's name with its varied axes, as the CSV has it."""
        return " ".join([self.row, *(f"{axis}={value}" for axis, value in self.vary)])

    @property
    def title(self) -> str:
        """The row's label with its varied axes, as a reader sees it."""
        axes = ", ".join(f"{papers.label('axes', axis)} = {value}" for axis, value in self.vary)
        return f"{self.label} ({axes})" if axes else self.label


@dataclass(frozen=True)
class Column:
    """One column: a task's own score (`metric` None) or a further metric of it."""

    task: str
    paper_task: str
    metric: str | None


@dataclass
class TableEntry:
    """One printed number, over all its seeds.

    Attributes:
        cells: the seeds' cells, by seed.
        metric: name of the metric.
        unit: what `value`, `std`, `paper` and `difference` are in.
        value: mean over the seeds that are done; None where none is.
        std: standard deviation over seeds; None for fewer than two.
        paper: the printed figure, or None.
        comparable: whether ours stands on the paper's own backbone and task.
        mark: `best`, `second` or nothing, among the rows of the same backbone.
        difference: ours minus the reference row's, on the same samples.
        interval: of 95 % over samples, of the mean over seeds; None where the number is no mean over samples.
    """

    line: Line
    column: Column
    cells: list[CellResult]
    metric: str
    unit: str
    value: float | None
    std: float | None
    paper: float | None
    comparable: bool
    mark: str = ""
    difference: Difference | None = None
    interval: tuple[float, float] | None = None

    @property
    def done(self) -> list[CellResult]:
        """The cells that have this number."""
        return [cell for cell in self.cells if _value(cell, self.column.metric) is not None]

    @property
    def open(self) -> list[CellResult]:
        """The cells that lack it."""
        return [cell for cell in self.cells if _value(cell, self.column.metric) is None]

    @property
    def run_ids(self) -> list[str]:
        """The runs behind it, by seed."""
        return [cell.run_id for cell in self.done if cell.run_id]


@dataclass
class Table:
    """A study, laid out."""

    study: StudyFile
    columns: list[Column]
    lines: list[Line]
    entries: dict[tuple[Line, Column], TableEntry]
    reference: str | None
    axes: list[str] = field(default_factory=list)
    note: str | None = None
    paper: str | None = None

    @property
    def reference_label(self) -> str:
        """Label of the row that the others are compared with; empty where there is none."""
        return next((line.label for line in self.lines if line.row == self.reference), "")

    def groups(self) -> list[tuple[str, list[Line]]]:
        """Return the lines by backbone, in the study's order."""
        names = list(dict.fromkeys(line.backbone for line in self.lines))
        return [(name, [line for line in self.lines if line.backbone == name]) for name in names]

    def row(self, line: Line) -> list[TableEntry]:
        """Return a line's entries, by column."""
        return [self.entries[line, column] for column in self.columns]


def build(study: StudyFile, params: Params, evaluations: Path) -> Table:
    """Lay a study out; the predictions in `evaluations` tell the differences between its rows."""
    definition = params.studies.get(study.study)
    path = definition.paper if definition else None
    extra = definition.metrics if definition else []
    tasks = dict.fromkeys((cell.task, cell.paper_task) for cell in study.cells)
    columns = [Column(*task, metric) for task in tasks for metric in (None, *extra)]
    lines = list(dict.fromkeys(_line(cell) for cell in study.cells))
    entries = {}
    for line in lines:
        for column in columns:
            cells = sorted(
                (cell for cell in study.cells if _line(cell) == line and cell.task == column.task),
                key=lambda cell: cell.seed,
            )
            entries[line, column] = _entry(line, column, cells, study, path, params)
    axes = list(dict.fromkeys(axis for line in lines for axis, _ in line.vary))
    reference = (definition.reference if definition else None) or _reference(study, lines)
    note = definition.notes() if definition else None
    table = Table(study, columns, lines, entries, reference, axes, note, path)
    for column in columns:
        for _, group in table.groups():
            _mark([entries[line, column] for line in group])
    scores = functools.cache(lambda key: sample_scores(key, evaluations))
    _compare(table, scores)
    for entry in entries.values():
        if entry.column.metric is None:
            entry.interval = _interval(entry, scores)
    return table


def _line(cell: CellResult) -> Line:
    plain = {axis: value if isinstance(value, int | float | str) else str(value) for axis, value in cell.vary.items()}
    return Line(cell.backbone, cell.paper_backbone, cell.row, cell.label, tuple(plain.items()))


def _entry(
    line: Line, column: Column, cells: list[CellResult], study: StudyFile, path: str | None, params: Params
) -> TableEntry:
    is_score = column.metric is None
    done = [cell for cell in cells if _value(cell, column.metric) is not None]
    # cells that are not done have no metric of their own: take the name from another row of the same task
    named = next((cell for cell in [*done, *study.cells] if cell.task == column.task and cell.metric), None)
    metric = column.metric or (named.metric if named and named.metric else "score")
    measured = named is not None and named.measurement is not None  # its number is no score of the task
    printed_as = (line.paper_backbone, column.paper_task, None if is_score and not measured else metric)
    own_unit = (named.unit if named and is_score else None) or papers.metric_facts(metric).measured_in or "percent"
    unit = papers.unit(path, study.study, *printed_as) or own_unit
    values = [
        papers.convert(
            float(_value(cell, column.metric) or 0.0),
            cell.units.get(metric) or (cell.unit if is_score and cell.unit else own_unit),
            unit,
        )
        for cell in done
    ]
    value, std = mean_std(values) if values else (None, None)
    published = params.backbone_source(line.backbone).variant == "published"
    same = line.backbone == line.paper_backbone and column.task == column.paper_task and published
    definition = params.studies.get(study.study)
    row = (definition.methods[line.row].paper if definition and line.row in definition.methods else None) or line.row
    printed = papers.printed_value(path, line.paper_backbone, row, *printed_as[1:])
    if printed is None and is_score:  # a table may be of the task's own metric by its name
        printed = papers.printed_value(path, line.paper_backbone, row, column.paper_task, metric)
    return TableEntry(line, column, cells, metric, unit, value, std, printed, comparable=same)


def _value(cell: CellResult, metric: str | None) -> float | None:
    if cell.status != "done":
        return None
    if metric is None:
        return cell.value
    plain = {name.lower().replace("_", ""): value for name, value in cell.metrics.items()}
    return plain.get(metric.lower().replace("_", ""))


def _mark(entries: Iterable[TableEntry]) -> None:
    """Mark best and second as they are printed: numbers that look equal share the mark."""
    known = [entry for entry in entries if entry.value is not None]
    if len(known) < 2:
        return
    lower = bool(papers.metric_facts(known[0].metric).lower_is_better)
    shown = {id(entry): round(entry.value or 0.0, papers.decimals(entry.unit)) for entry in known}
    places = sorted(set(shown.values()), reverse=not lower)
    for entry in known:
        place = places.index(shown[id(entry)])
        entry.mark = ("best", "second")[place] if place < 2 and len(places) > 1 else ""


def _reference(study: StudyFile, lines: Sequence[Line]) -> str | None:
    """Return the row the others are compared with: the paper's own method, else the best without training."""
    rows = list(dict.fromkeys(line.row for line in lines))
    if len(rows) < 2:
        return None
    paper = study.study.partition("-")[0]
    if paper in rows:
        return paper
    free = [cell for cell in study.cells if cell.value is not None and not cell.trainable_parameters]
    return max(free, key=lambda cell: cell.value or 0.0).row if free else rows[0]


def _compare(table: Table, scores: ScoreLookup) -> None:
    for (line, column), entry in table.entries.items():
        if column.metric is not None or line.row == table.reference or entry.value is None:
            continue
        wanted = (line.backbone, line.vary, table.reference)
        reference = next((row for row in table.lines if (row.backbone, row.vary, row.row) == wanted), None)
        if reference is not None:
            of_reference = by_sample(table.entries[reference, column], scores)
            entry.difference = paired_bootstrap(by_sample(entry, scores), of_reference)


def _interval(entry: TableEntry, scores: ScoreLookup) -> tuple[float, float] | None:
    units = {scores(cell.evaluation).unit for cell in entry.done if cell.evaluation}
    top = papers.convert(100.0, "percent", entry.unit) if units == {"percent"} else None  # a percentage is bounded
    return interval(list(by_sample(entry, scores).values()), top)


def by_sample(entry: TableEntry, scores: ScoreLookup) -> dict[str, float]:
    """Return the score of each sample, averaged over the seeds that scored it, in the entry's unit.

    Nothing where the number is a measurement: the samples' scores are of something else.
    """
    seen: dict[str, list[float]] = {}
    for cell in entry.done:
        if cell.evaluation is not None and cell.measurement is None:
            unit, of_cell = scores(cell.evaluation)
            for sample, score in of_cell.items():
                seen.setdefault(sample, []).append(papers.convert(score, unit, entry.unit))
    return {sample: sum(values) / len(values) for sample, values in seen.items()}


def sample_scores(key: str, evaluations: Path) -> SampleScores:
    """Return an evaluation's scores by sample; none where its score is no mean over samples (CHAIR, MME)."""
    evaluation = Evaluations(evaluations).find(key)
    if evaluation is None or evaluation.value is None:
        return SampleScores("", {})
    scores = {str(answer.sample_id): answer.score for answer in evaluation.predictions if answer.score is not None}
    if not scores:
        return SampleScores("", {})
    mean = sum(scores.values()) / len(scores)
    close = abs(mean - evaluation.value) <= _TOLERANCE * max(abs(evaluation.value), abs(mean), 1e-9)
    return SampleScores(evaluation.unit, scores) if close else SampleScores("", {})


def problems_of(cells: Sequence[CellResult]) -> list[str]:
    """Return which cells have no number and why, one sentence for all seeds with the same problem."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        if cell.status != "done":
            names = [cell.label, papers.label("backbones", cell.backbone), papers.label("tasks", cell.task)]
            names += [f"{axis} = {value}" for axis, value in cell.vary.items()]
            problem = f"{cell.status}. {cell.error}" if cell.error else cell.status
            seeds.setdefault((", ".join(names), problem), []).append(cell.seed)
    return [
        f"{name}, seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}: {problem}"
        for (name, problem), numbers in seeds.items()
    ]


_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


@dataclass(frozen=True)
class Cost:
    """A column beside the scores: what a row took to train.

    Attributes:
        field: of a cell.
        title: head of the column.
        below: what the number is, in small print.
        text: what is shown for the values of a row's cells, of which there is one at least.
    """

    field: str
    title: str
    below: str
    text: Callable[[Sequence[float]], str]


def _flops(value: float) -> str:
    """Return FLOPs with a prefix."""
    size, prefix = next(((size, prefix) for size, prefix in _PREFIXES if value >= size), (1.0, ""))
    return f"{value / size:.3g} {prefix}FLOP"


def _memory(value: float) -> str:
    """Return bytes in MiB or GiB."""
    return f"{value / (1 << 30):.3g} GiB" if value >= 1 << 30 else f"{value / (1 << 20):,.0f} MiB"


def _range(values: Sequence[float]) -> str:
    return " - ".join(dict.fromkeys((f"{min(values):,.0f}", f"{max(values):,.0f}")))


COSTS = (
    Cost("trainable_parameters", "Trainable", "parameters", _range),
    Cost("train_seconds", "Training", "mean of a trial", lambda values: f"{fmean(values):,.1f} s"),
    Cost("train_flops", "FLOPs", "mean, by formula", lambda values: _flops(fmean(values))),
    Cost("peak_memory_bytes", "Memory", "peak of a trial", lambda values: _memory(max(values))),
)


def costs_of(table: Table) -> list[Cost]:
    """Return the columns that have an entry."""
    return [cost for cost in COSTS if any(getattr(cell, cost.field) for cell in table.study.cells)]


def cost_values(cost: Cost, table: Table, line: Line) -> list[float]:
    """Return what a row's cells have in one column, where they have something."""
    cells = [cell for entry in table.row(line) for cell in entry.cells]
    return [float(value) for value in (getattr(cell, cost.field) for cell in cells) if value]


def cost_of(cost: Cost, table: Table, line: Line) -> str:
    """Return a row's entry in one column; nothing where nothing is known."""
    known = cost_values(cost, table, line)
    return cost.text(known) if known else ""
