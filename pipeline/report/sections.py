"""A study's section of the page: what its template shows, as plain objects, and the sentences below its table."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from markupsafe import Markup

from pipeline.records.evaluation import CellResult
from pipeline.records.trial import Provenance
from pipeline.report import papers
from pipeline.report.answers import AnswerTable
from pipeline.report.drawing import Drawing, safe
from pipeline.report.tables import (
    Column,
    Cost,
    Line,
    Table,
    TableEntry,
    cost_of,
    cost_values,
    costs_of,
    metric_words,
    problems_of,
)
from pipeline.report.writers import format_value, to_csv


@dataclass(frozen=True)
class Head:
    """The head of a column: its title, and small print below it."""

    title: str
    below: str


@dataclass(frozen=True)
class CostCell:
    """A row's entry in one column of costs; `paper` is the printed size, or empty."""

    text: str
    value: float | None
    paper: str


@dataclass(frozen=True)
class Row:
    """A row of the table; each entry comes with the id of its run's row in the page, or nothing."""

    title: str
    entries: list[tuple[TableEntry, str]]
    costs: list[CostCell]


@dataclass(frozen=True)
class RowGroup:
    """The rows of one backbone."""

    title: str
    below: str
    rows: list[Row]


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure with its words for readers who do not see it, and its caption."""

    svg: Markup
    words: str
    caption: str


@dataclass(frozen=True)
class TriedSetting:
    """One setting that was searched for a number: the best selection score at each of its values, over seeds.

    Attributes:
        trials: that were tried for each seed.
        setting: its name.
        values: each value with the mean over seeds of the best score there; None where no trial ended.
        chosen: the values that were chosen, and for how many seeds.
        ends: those of them that lie at an end of what was tried.
        matters: best score less worst one; None where fewer than two values are known.
    """

    line: Line
    task: str
    trials: int
    setting: str
    values: list[tuple[str, float | None]]
    chosen: dict[str, int]
    ends: list[str]
    matters: float | None


def tried_settings(table: Table) -> list[TriedSetting]:
    """Return what was searched, a row a setting of each number that had more than one trial."""
    out = []
    for entry in table.entries.values():
        cells = [cell for cell in entry.cells if len(cell.candidates) > 1] if entry.column.metric is None else []
        names = dict.fromkeys(name for cell in cells for row in cell.candidates for name in row.searched)
        out += [_tried(entry, cells, name) for name in names]
    return [row for row in out if len(row.values) > 1]


def _tried(entry: TableEntry, cells: Sequence[CellResult], name: str) -> TriedSetting:
    known = {short_value(row.searched.get(name)): row.searched.get(name) for cell in cells for row in cell.candidates}
    numbers = [value for value in known.values() if isinstance(value, int | float) and not isinstance(value, bool)]
    texts = sorted(known, key=float) if len(numbers) == len(known) else list(known)
    best: dict[str, float | None] = {}
    for text in texts:
        of_seeds = [
            [
                row.selection_score
                for row in cell.candidates
                if short_value(row.searched.get(name)) == text and row.selection_score is not None
            ]
            for cell in cells
        ]
        scores = [max(of_seed) for of_seed in of_seeds if of_seed]
        best[text] = fmean(scores) if scores else None
    chosen = Counter(short_value(cell.searched[name]) for cell in cells if name in cell.searched)
    ends = [text for text in chosen if len(numbers) == len(known) > 1 and text in (texts[0], texts[-1])]
    ended = [score for score in best.values() if score is not None]
    matters = max(ended) - min(ended) if len(ended) > 1 else None
    count = max(len(cell.candidates) for cell in cells)
    return TriedSetting(
        entry.line, entry.column.task, count, name, [(text, best[text]) for text in texts], dict(chosen), ends, matters
    )


def _budget(tried: Sequence[TriedSetting]) -> Iterator[str]:
    """Say how many trials each row had, and what was chosen at an end of its space."""
    trials = {row.line.label: row.trials for row in tried}
    if not trials:
        return
    if len(set(trials.values())) == 1:
        rows = "every row that was searched" if len(trials) > 1 else next(iter(trials))
        yield f"Of {next(iter(trials.values()))} trials for each number of {rows}, the selection split chose one."
    else:
        yield f"Trials for each number: {', '.join(f'{row} {count}' for row, count in trials.items())}."
    at_ends: dict[str, dict[str, list[str]]] = {}  # by row, and by setting with its values: the tasks
    for row in tried:
        if 0 < len(row.ends) < len(row.values):  # where each value was the best of some seed, none points farther
            setting = f"{papers.label('axes', row.setting)} = {' and '.join(row.ends)}"
            tasks = at_ends.setdefault(row.line.label, {}).setdefault(setting, [])
            tasks.append(papers.label("tasks", row.task))
    if at_ends:
        listed = "; ".join(
            f"{label}, " + ", ".join(f"{setting} ({', '.join(dict.fromkeys(of))})" for setting, of in settings.items())
            for label, settings in at_ends.items()
        )
        yield f"At an end of what was tried, so that more might help: {listed}."


_RISE = 1.1  # of an epoch's training loss over the one before it: beyond what the order of samples does


def _unsteady(table: Table) -> Iterator[str]:
    """Say whose training loss rose from one epoch to the next: another machine's number may be another."""
    rows: dict[str, list[str]] = {}
    for entry in table.entries.values():
        for cell in entry.done if entry.column.metric is None else ():
            losses = [epoch.train_loss for epoch in cell.epochs if epoch.train_loss is not None]
            if any(after > _RISE * before > 0 for before, after in pairwise(losses)):
                curve = ", ".join(f"{loss:.3g}" for loss in losses)
                where_it_rose = f"{papers.label('tasks', entry.column.task)}, seed {cell.seed}: {curve}"
                rows.setdefault(entry.line.title, []).append(where_it_rose)
    if rows:
        listed = "; ".join(f"{title} ({'; '.join(curves)})" for title, curves in rows.items())
        yield (
            f"The training loss rose between epochs: {listed}. Another seed or kind of processor may give another "
            "number; a lower learning rate trains more steadily."
        )


@dataclass(frozen=True)
class RunRow:
    """A row of the table of runs: a cell with its id in the page (`place`) and what was chosen for it."""

    place: str
    line: Line
    title: str
    backbone: str
    task: str
    cell: CellResult
    chosen: str
    value: str


@dataclass(frozen=True)
class StudySection:
    """What `study.html.j2` shows.

    Attributes:
        csv: the table as a data URI.
        missing: cells without a number.
        width: columns of the table.
        figures_first: whether they stand above the table.
        answers: of the methods side by side, or None.
        reference: label of the row that the others are compared with.
        differences: the entries that have a difference from it.
    """

    name: str
    title: str
    csv: str
    total: int
    missing: int
    code: str
    notes: list[str]
    problems: list[str]
    costs: list[Cost]
    heads: list[Head]
    groups: list[RowGroup]
    figures: list[CaptionedFigure]
    width: int
    figures_first: bool
    answers: AnswerTable | None
    reference: str
    differences: list[TableEntry]
    runs: list[RunRow]
    tried: list[TriedSetting]


def study_section(
    table: Table, printed: papers.PaperTable | None, figures: Mapping[str, Drawing], answers: AnswerTable | None
) -> StudySection:
    """Return what the page shows of a study."""
    columns = costs_of(table)
    sentences = notes(table)
    if printed and printed.note:
        sentences.append(f"{printed.paper}, {printed.place}: {printed.note}.")
    runs = _runs(table)
    places = {(row.line, row.cell.task): row.place for row in reversed(runs) if row.value}
    return StudySection(
        name=table.study.study,
        title=table.study.title,
        csv="data:text/csv;base64," + base64.b64encode(to_csv(table).encode()).decode(),
        total=len(table.study.cells),
        missing=len(table.study.cells) - done(table),
        code=code(table.study.provenance),
        notes=sentences,
        problems=problems_of(table.study.cells),
        costs=columns,
        heads=[_head(table, column) for column in table.columns],
        groups=[
            RowGroup(
                papers.label("backbones", backbone),
                f"stands for {papers.label('backbones', lines[0].paper_backbone)}"
                if backbone != lines[0].paper_backbone
                else "",
                [_row(table, line, printed, columns, places) for line in lines],
            )
            for backbone, lines in table.groups()
        ],
        figures=[
            CaptionedFigure(Markup(drawing.svg), drawing.words, _caption(table, name))  # noqa: S704 - our own SVG
            for name, drawing in figures.items()
        ],
        width=len(table.columns) + 1 + len(columns),
        figures_first=bool(table.axes),
        answers=answers,
        reference=table.reference_label,
        differences=[entry for entry in table.entries.values() if entry.difference],
        runs=runs,
        tried=tried_settings(table),
    )


def done(table: Table) -> int:
    """Return how many of a study's cells have their number."""
    return sum(cell.status == "done" and cell.value is not None for cell in table.study.cells)


def code(origin: Provenance, whole: bool = False) -> str:
    """Return the commit that a study was evaluated at, or why there is none."""
    if not origin.commit:
        return origin.note or ""
    text = origin.commit if whole else origin.commit[:10]
    return f"{text} with uncommitted changes" if origin.dirty else text


def short_value(value: object) -> str:
    """Return a value of a setting in few letters."""
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _runs(table: Table) -> list[RunRow]:
    """Return the rows of the table of runs: one a cell, each with its place in the page."""
    cells = [(e, cell) for e in table.entries.values() if e.column.metric is None for cell in e.cells]
    return [
        RunRow(
            place=f"{safe(table.study.study)}-run-{number}",
            line=entry.line,
            title=entry.line.title,
            backbone=papers.label("backbones", entry.line.backbone),
            task=papers.label("tasks", entry.column.task),
            cell=cell,
            chosen=", ".join(f"{key} = {short_value(value)}" for key, value in cell.searched.items()),
            value=""
            if cell.value is None
            else format_value(papers.convert(cell.value, cell.unit or entry.unit, entry.unit), entry.unit),
        )
        for number, (entry, cell) in enumerate(cells, start=1)
    ]


def _row(
    table: Table,
    line: Line,
    paper: papers.PaperTable | None,
    columns: Sequence[Cost],
    places: Mapping[tuple[Line, str], str],
) -> Row:
    printed = papers.printed_value(paper.path, line.paper_backbone, line.row, "params_m") if paper else None
    size = f"{printed:g} M" if printed is not None else ""
    return Row(
        line.title,
        [(entry, places.get((line, entry.column.task), "")) for entry in table.row(line)],
        [
            CostCell(
                cost_of(cost, table, line),
                fmean(spent) if (spent := cost_values(cost, table, line)) else None,
                size if cost.field == "trainable_parameters" else "",
            )
            for cost in columns
        ],
    )


def _head(table: Table, column: Column) -> Head:
    entry = table.entries[table.lines[0], column]
    metric = metric_words(entry, table.reference_label)
    task, paper_task = papers.label("tasks", column.task), papers.label("tasks", column.paper_task)
    stand_in = column.task != column.paper_task
    if column.metric is None:
        return Head(task, f"{metric}; for {paper_task}" if stand_in else metric)
    direction = ", lower is better" if papers.metric_facts(entry.metric).lower_is_better else ""
    return Head(metric, (f"{task} for {paper_task}" if stand_in else task) + direction)


def _caption(table: Table, name: str) -> str:
    if name.startswith("tokens-"):
        return "Mean over heads and tokens, of the first seed; the i-th of another layer or seed is another token."
    bars = name.startswith("bars-")
    shown_here = [entry for entry in table.entries.values() if f"bars-{safe(entry.line.backbone)}" == name]
    printed = [entry for entry in shown_here if entry.paper is not None]
    apart = any(not entry.comparable for entry in printed)
    parts = [f"Above: ours. Below, hollow: the paper's{', on axes of their own' if apart else ''}."] if printed else []
    repeated = any(entry.std is not None for entry in table.entries.values())
    parts.append(f"{'Whiskers' if bars else 'Bands'}: one standard deviation over seeds." if repeated else "One seed.")
    if bars and table.reference_label and len({entry.line for entry in shown_here}) > 1:
        parts.append(f"In bold: {table.reference_label}, with which the others are compared.")
    return " ".join(parts)


_SELECTION = {
    "selection": "Epoch and hyperparameters were chosen on a selection split held out of the training pool; "
    "the evaluation split was scored once.",
    "test": "Epoch and hyperparameters were chosen on the evaluation split itself{as_the_papers}: "
    "the numbers are optimistic.",
}


def notes(table: Table) -> list[str]:
    """Return the sentences; a study that is of no paper speaks of none."""
    out = [table.note] if table.note else []
    out += [*_samples(table), _protocol(table)]
    selection = _SELECTION.get(table.study.selection, f"Selection: {table.study.selection}.")
    out.append(selection.replace("{as_the_papers}", ", as the papers do" if table.paper else ""))
    out += _budget(tried_settings(table))
    out += _unsteady(table)
    printed = any(entry.paper is not None for entry in table.entries.values())
    for stand_in, model in stand_ins([table]):
        known = ": the paper's numbers are of that model, so no difference is shown" if printed else ""
        out.append(f"{stand_in} stands for {model}{known}.")
    return out


def stand_ins(tables: list[Table]) -> list[tuple[str, str]]:
    """Return which backbone plays which of a study's, by their labels, each pair once."""
    pairs = {
        (papers.label("backbones", line.backbone), papers.label("backbones", line.paper_backbone)): None
        for table in tables
        for line in table.lines
        if line.backbone != line.paper_backbone
    }
    return list(pairs)


def _samples(table: Table) -> list[str]:
    """Say how many samples and seeds a number is of, and how far chance reaches."""
    numbers = [entry for entry in table.entries.values() if entry.column.metric is None and entry.done]
    scored = [entry for entry in numbers if all(cell.measurement is None for cell in entry.done)]
    seeds = sorted({cell.seed for entry in numbers for cell in entry.done})
    if not seeds:
        return []
    listed = ", ".join(map(str, seeds))
    count = f"{len(seeds)} seeds ({listed})" if len(seeds) > 1 else f"One seed ({listed})"
    count += " on the same training samples" if len(seeds) > 1 and table.same_draw else ""
    sizes: dict[str, list[str]] = {}
    reach: dict[str, tuple[float, TableEntry]] = {}
    for entry in scored:
        task = papers.label("tasks", entry.column.task)
        of_task = {cell.num_samples for cell in entry.done if cell.num_samples}
        for size in of_task:
            tasks = sizes.setdefault(f"{size:,}", [])
            tasks += [task] if task not in tasks else []
        if entry.interval and entry.value is not None:
            far = max(entry.value - entry.interval[0], entry.interval[1] - entry.value)
            reach[task] = max(reach.get(task, (0.0, entry)), (far, entry), key=lambda pair: pair[0])
    of = "; ".join(f"{size} evaluation samples of {', '.join(tasks)}" for size, tasks in sizes.items())
    out = [f"{count}; scored on {of}." if of else f"{count}."]
    if reach:
        far_out = ", ".join(f"{format_value(far, entry.unit)} on {task}" for task, (far, entry) in reach.items())
        over = "seeds and samples" if len(seeds) > 1 else "samples"
        out.append(f"The 95 % interval over {over} reaches at most so far from a number: {far_out}.")
    return out


def _protocol(table: Table) -> str:
    name = table.study.protocol
    if name is not None:
        return f"Protocol: {name}, the choices of the published code all together (docs/methods.md)."
    of = "the equations and prompts of the papers" if table.paper else "none"
    return f"Protocol: {of}; hificl trials prints every setting."
