"""A study's cells as the papers lay them out: averaged over seeds, in the table's unit, marked, with costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.load import Params
from pipeline.core.statistics import Effect, counted, effect, interval, mean_std
from pipeline.records.evaluation import CellResult, Evaluations, StudyFile
from pipeline.report import papers

_TOLERANCE = 1e-3  # relative: a score that differs more from its samples' mean is no mean over samples


class SampleScores(NamedTuple):
    """One evaluation's score of each sample.

    Attributes:
        unit: of the scores.
        samples: their ids, sorted; none where the evaluation's score is no mean over samples (CHAIR, MME).
        values: the scores.
        images: a number for each sample's image.
        own_draw: whether the trial's training samples were drawn by its seed.
    """

    unit: str = ""
    samples: tuple[str, ...] = ()
    values: np.ndarray = np.empty(0)
    images: np.ndarray = np.empty(0, dtype=np.int64)
    own_draw: bool = False


ScoreLookup = Callable[[str], SampleScores]  # by an evaluation's key


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
        values: of the seeds that are done, as `done` has them.
        mark: `best`, `second` or nothing, among the rows of the same backbone.
        difference: ours minus the reference row's, at the same seeds, on the same samples.
        interval: of 95 %, over samples by whole images and, where there are several, over seeds; None where the number
            is no mean over samples.
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
    values: Sequence[float] = ()
    mark: str = ""
    difference: Effect | None = None
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
    def absence(self) -> str:
        """What stands in a number's place: the first cell's state; a dash where its task has no such metric."""
        return self.cells[0].status if self.cells and self.cells[0].status != "done" else "-"

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
    smallest_effect: Mapping[str, float] = field(default_factory=dict)
    same_draw: bool = False  # the seeds' trials trained on the same samples

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
    smallest = definition.smallest_effect if definition else {}
    table = Table(study, columns, lines, entries, reference, axes, note, path, smallest)
    for column in columns:
        for _, group in table.groups():
            _mark([entries[line, column] for line in group])
    scores = score_lookup(evaluations)
    _compare(table, scores)
    keys = {cell.evaluation for cell in study.cells if cell.evaluation and cell.trainable_parameters}
    table.same_draw = bool(keys) and not any(scores(key).own_draw for key in keys)
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
    return TableEntry(line, column, cells, metric, unit, value, std, printed, same, values)


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
    if len(known) < 2 or not papers.metric_facts(known[0].metric).ranked:
        return
    lower = papers.metric_facts(known[0].metric).lower_is_better
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
        of_row = (row for row in table.lines if (row.backbone, row.row) == (line.backbone, table.reference))
        reference = next((row for row in of_row if set(row.vary) <= set(line.vary)), None)  # or it has no such axis
        if reference is not None:
            against = table.entries[reference, column]
            entry.difference = contrast(((1.0, entry), (-1.0, against)), scores, over_samples=True)


def _interval(entry: TableEntry, scores: ScoreLookup) -> tuple[float, float] | None:
    known = _aligned((entry,), scores)
    if known is None:
        return None
    (of_seeds,), images = known
    units = {scores(cell.evaluation).unit for cell in entry.done if cell.evaluation}
    top = papers.convert(100.0, "percent", entry.unit) if units == {"percent"} else None  # a percentage is bounded
    over_both = effect(of_seeds, images) if len(of_seeds) > 1 else None
    if over_both and over_both.error:
        low, high = over_both.interval()
        return (low, high) if top is None else (max(low, 0.0), min(high, top))
    return interval(of_seeds.mean(axis=0).tolist(), top, images)


def contrast(
    terms: Sequence[tuple[float, TableEntry]], scores: ScoreLookup, over_samples: bool = False
) -> Effect | None:
    """Return a weighted sum of numbers with its error over seeds and samples, the same ones for all of them.

    So what makes a seed or an image hard for all of them falls out.

    Args:
        terms: the weights and the numbers.
        scores: of each evaluation's samples.
        over_samples: nothing where a number is no mean over samples; else the error is then over seeds alone.

    Returns:
        In the entries' unit; None where nothing can be said: no seed has all of them, or one alone, without samples.
    """
    weights, entries = zip(*terms, strict=True)
    known = _aligned(entries, scores)
    if known is not None:
        matrices, images = known
        return effect(np.tensordot(weights, matrices, 1), images)
    if over_samples:
        return None
    of_seeds = [{cell.seed: value for cell, value in zip(entry.done, entry.values, strict=True)} for entry in entries]
    shared = sorted(set.intersection(*map(set, of_seeds)))
    if not shared:
        return None
    sums = [sum(weight * row[seed] for weight, row in zip(weights, of_seeds, strict=True)) for seed in shared]
    if papers.metric_facts(entries[0].metric).counted:
        return counted(sum(sums) / len(sums))
    return effect(np.array(sums)[:, None], (0,))


def _aligned(entries: Sequence[TableEntry], scores: ScoreLookup) -> tuple[list[np.ndarray], np.ndarray] | None:
    """Return each entry's scores, [seeds, samples], of the seeds and samples that all have, and the samples' images.

    None where a number is no mean over samples (a measurement: the samples' scores are of something else).
    """
    if any(entry.column.metric is not None for entry in entries):
        return None
    of_seeds = [
        {cell.seed: scores(cell.evaluation) for cell in entry.done if cell.evaluation and cell.measurement is None}
        for entry in entries
    ]
    seeds = sorted(set.intersection(*map(set, of_seeds)))
    read = [[row[seed] for seed in seeds] for row in of_seeds]
    first = read[0][0] if seeds else SampleScores()
    if any(known.samples != first.samples for row in read for known in row):
        shared = set.intersection(*(set(known.samples) for row in read for known in row))
        read = [[_restricted(known, shared) for known in row] for row in read]
        first = read[0][0]
    if not first.samples:
        return None
    matrices = [
        np.stack([known.values * papers.convert(1.0, known.unit, entry.unit) for known in row])
        for entry, row in zip(entries, read, strict=True)
    ]
    return matrices, first.images


def _restricted(known: SampleScores, samples: set[str]) -> SampleScores:
    kept = [place for place, sample in enumerate(known.samples) if sample in samples]
    ids = tuple(known.samples[place] for place in kept)
    return known._replace(samples=ids, values=known.values[kept], images=known.images[kept])


def score_lookup(evaluations: Path) -> ScoreLookup:
    """Return what gives an evaluation's scores by its key; a file is read once."""
    records, folder = Evaluations(evaluations), evaluations.resolve()

    @functools.cache
    def look_up(key: str) -> SampleScores:
        try:
            stat = records.path(key).stat()
        except OSError:
            return SampleScores()
        return _sample_scores(key, folder, stat.st_mtime_ns, stat.st_size)

    return look_up


@functools.lru_cache(maxsize=2000)  # 40 KB each, of 2,000 samples
def _sample_scores(key: str, evaluations: Path, *_version: int) -> SampleScores:
    evaluation = Evaluations(evaluations).find(key)
    if evaluation is None:
        return SampleScores()
    own_draw = evaluation.config.get("sample_draw") == "by-seed"
    if evaluation.value is None:
        return SampleScores(own_draw=own_draw)
    answers = {str(answer.sample_id): answer for answer in evaluation.predictions if answer.score is not None}
    samples = tuple(sorted(answers))
    values = np.array([answers[sample].score for sample in samples], dtype=np.float64)
    far = _TOLERANCE * max(abs(evaluation.value), abs(values.mean()) if samples else 0.0, 1e-9)
    if not samples or abs(values.mean() - evaluation.value) > far:
        return SampleScores(own_draw=own_draw)
    _, images = np.unique([answers[sample].image or sample for sample in samples], return_inverse=True)
    return SampleScores(evaluation.unit, samples, values, images, own_draw)


def metric_words(entry: TableEntry, reference: str = "") -> str:
    """Return the name of an entry's metric with its unit; a factor's with what it is a factor of."""
    sign = f"× {reference}" if entry.unit == "times" and reference else papers.sign(entry.unit)
    return papers.label("metrics", entry.metric) + (f" ({sign})" if sign else "")


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
        axis: the words of a figure's axis.
        text: what is shown for the values of a row's cells, of which there is one at least.
    """

    field: str
    title: str
    below: str
    axis: str
    text: Callable[[Sequence[float]], str]

    def ticks(self, values: Sequence[float]) -> list[float]:
        """Return round numbers around `values` for a logarithmic axis: 1, 2, 5 times 10^k, powers of 2 for bytes."""
        steps, base = ((1.0,), 2.0) if self.field.endswith("bytes") else ((1.0, 2.0, 5.0), 10.0)
        low, high = (math.floor(math.log(of(values), base)) for of in (min, max))
        every = [step * base**power for power in range(low, high + 2) for step in steps]
        first = max(tick for tick in every if tick <= min(values))
        last = min(tick for tick in every if tick >= max(values))
        return [tick for tick in every if first <= tick <= last]


def _flops(value: float) -> str:
    """Return FLOPs with a prefix."""
    size, prefix = next(((size, prefix) for size, prefix in _PREFIXES if value >= size), (1.0, ""))
    return f"{value / size:.3g} {prefix}FLOP"


def _seconds(values: Sequence[float]) -> str:
    return f"{fmean(values):,.1f} s"


def _memory(value: float) -> str:
    """Return bytes in MiB or GiB."""
    return f"{value / (1 << 30):.3g} GiB" if value >= 1 << 30 else f"{value / (1 << 20):,.0f} MiB"


def _range(values: Sequence[float]) -> str:
    return " - ".join(dict.fromkeys((f"{min(values):,.0f}", f"{max(values):,.0f}")))


COSTS = (
    Cost("trainable_parameters", "Trainable", "parameters", "trainable parameters", _range),
    Cost("train_seconds", "Training", "mean of a trial", "seconds of training", _seconds),
    Cost("train_flops", "FLOPs", "mean, by formula", "FLOPs of training", lambda values: _flops(fmean(values))),
    Cost("peak_memory_bytes", "Memory", "peak of a trial", "peak memory (bytes)", lambda values: _memory(max(values))),
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
