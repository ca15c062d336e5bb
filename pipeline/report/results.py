"""A study's table in the terminal: as the paper lays it out, in as many pieces as the width needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from pipeline.core.terminal import BAD, QUIET, Answer, table
from pipeline.report import papers, sections
from pipeline.report.tables import Column, Line, Table, TableEntry
from pipeline.report.writers import format_value

_GAP = 2  # between two columns
_STYLES = {"best": "bold", "second": "underline"}
_PROBLEMS = 5  # are said one by one


@dataclass(frozen=True)
class StudyResults(Answer):
    """What studies came out as."""

    tables: Sequence[Table]

    def record(self) -> dict[str, list[dict[str, object]]]:
        """Return a record a cell by study; value, spread and the paper's figure are in `unit`."""
        return {
            table.study.study: [
                {
                    "backbone": line.backbone, "task": entry.column.task, "method": line.method, "metric": entry.metric,
                    "unit": entry.unit, "value": entry.value, "std": entry.std, "seeds": len(entry.done),
                    "paper": entry.paper, "run_ids": entry.run_ids,
                }
                for line in table.lines
                for entry in table.row(line)
            ]
            for table in self.tables
        }  # fmt: skip

    def shown(self) -> Iterator[RenderableType]:
        """Give the studies' tables."""
        for nth, study in enumerate(self.tables):
            if nth:
                yield ""
            yield Results(study)


@dataclass(frozen=True)
class Results:
    """What a study came out as: a row a method, or a row a point below the name of its curve; the best has a star.

    The paper's figure stands beside ours where both are of the same backbone, task and weights.
    """

    of: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Give the title, a table a backbone, and what has to be known to read them."""
        yield Text(f"{self.of.study.title} ({self.of.study.study})", style="bold")
        for backbone, lines in self.of.groups():
            paper = lines[0].paper_backbone
            stands = f", stands for {papers.label('backbones', paper)}" if paper != backbone else ""
            yield Text(f"\n{papers.label('backbones', backbone)}{stands}")
            yield from self._rows(lines, options.max_width)
        yield Text("\n".join(("", *self._legend())), style=QUIET)
        problems = sections.problems(self.of.study.cells)
        more = [f"and {len(problems) - _PROBLEMS} more"] if len(problems) > _PROBLEMS else []
        yield from (Text(problem, style=BAD) for problem in (*problems[:_PROBLEMS], *more))

    def _rows(self, lines: Sequence[Line], width: int) -> Iterator[RenderableType]:
        heads = ["method", *(papers.label("axes", axis) for axis in self.of.axes)]
        names = [self._name(line, before) for line, before in zip(lines, (None, *lines), strict=False)]
        taken = sum(_width(column) + _GAP for column in zip(heads, *names, strict=True))
        parts = [(column, self._parts(column, lines)) for column in self.of.columns]
        for nth, some in enumerate(_pieces(parts, width - taken)):
            made = table(*heads, right=heads[1:])
            for _, columns in some:
                for head, *_ in columns:
                    made.add_column(head, justify="right", no_wrap=True)
            for row, name in enumerate(names):
                made.add_row(*name, *(texts[row] for _, columns in some for _, *texts in columns))
            if nth:
                yield ""
            yield made

    def _name(self, line: Line, before: Line | None) -> list[str]:
        """Return the cells that name a row; a curve's name stands at its first point."""
        values = dict(line.vary)
        points = [str(values.get(axis, "")) for axis in self.of.axes]
        return ["" if before and self.of.axes and before.row == line.row else line.label, *points]

    def _parts(self, column: Column, lines: Sequence[Line]) -> list[list[Text]]:
        """Return a column of ours, and one of the paper's where the two compare: a head and a text a row."""
        entries = [self.of.entries[line, column] for line in lines]
        metric = papers.label("metrics", entries[0].metric)
        head = f"{papers.label('tasks', column.task)}\n{metric} {papers.sign(entries[0].unit)}".strip()
        widest = max(
            (len(format_value(entry.std, entry.unit)) for entry in entries if entry.std is not None), default=0
        )
        columns = [[Text(head, justify="right"), *(_number(entry, widest) for entry in entries)]]
        if any(entry.comparable and entry.paper is not None for entry in entries):
            beside = ["" if entry.paper is None else format_value(entry.paper, entry.unit) for entry in entries]
            columns.append([Text("paper", justify="right"), *(Text(text, style=QUIET) for text in beside)])
        return columns

    def _legend(self) -> Iterator[str]:
        """Give what has to be known to read the numbers."""
        seeds = sorted({len(entry.done) for entry in self.of.entries.values() if entry.std is not None})
        several = " to ".join(dict.fromkeys(map(str, (seeds[0], seeds[-1])))) if seeds else ""
        spread = f"mean ± standard deviation over {several} seeds" if seeds else "one seed"
        yield f"* the best of its backbone; {spread}"
        if self.of.note:
            yield self.of.note


def _number(entry: TableEntry, widest: int) -> Text:
    """Return a number with its mark and its spread, which takes `widest` columns where there is any in this column."""
    if entry.value is None:
        return Text(entry.cells[0].status if entry.cells else "-", style=BAD if entry.cells else "")
    text = Text(format_value(entry.value, entry.unit), style=_STYLES.get(entry.mark, ""))
    text.append("*" if entry.mark == "best" else " ")
    spread = (
        f" ± {format_value(entry.std, entry.unit):>{widest}}"
        if entry.std is not None
        else " " * (widest and widest + 3)
    )
    text.append(spread, style=QUIET)
    return text


def _width(texts: Sequence[str]) -> int:
    return max(cell_len(line) for text in texts for line in text.split("\n"))


def _pieces(
    parts: Sequence[tuple[Column, list[list[Text]]]], width: int
) -> Iterator[list[tuple[Column, list[list[Text]]]]]:
    """Give the columns in groups that are no wider than `width`, one at least in each."""
    some: list[tuple[Column, list[list[Text]]]] = []
    left = width
    for part in parts:
        wide = sum(_width([text.plain for text in column]) + _GAP for column in part[1])
        if some and wide > left:
            yield some
            some, left = [], width
        some.append(part)
        left -= wide
    yield some
