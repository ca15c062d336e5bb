"""A study's table as text: CSV, Markdown, LaTeX, the numbers of `dvc metrics` and `dvc plots`, and the terminal's."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from pipeline.core import terminal
from pipeline.core.terminal import BAD, QUIET, Answer
from pipeline.report import papers
from pipeline.report.tables import Column, Line, Table, TableEntry, cost_of, costs_of, metric_words, problems_of

COLUMNS = ("backbone", "task", "method", "metric", "value", "std", "seeds", "paper", "run_ids")
Tree = dict[str, "Tree | float"]  # numbers by name, nested as `dvc metrics` shows them

SCORES = ("study", "backbone", "task", "metric", "unit", "method", "value")
_TEX = {  # of what a name or a unit may hold
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$",
    "≤": r"$\le$", "≥": r"$\ge$", "→": r"$\to$", "−": "$-$", "Δ": r"$\Delta$", "λ": r"$\lambda$", "²": "$^2$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}  # fmt: skip


def to_csv(table: Table) -> str:
    """Return one row a cell of the table; `value`, `std` and `paper` in the unit that the paper's table prints."""
    rows = []
    for line in table.lines:
        for entry in table.row(line):
            names, numbers = (line.backbone, entry.column.task, line.method, entry.metric), (entry.value, entry.std)
            rows.append((*names, *map(number, numbers), len(entry.done), number(entry.paper), ";".join(entry.run_ids)))
    return _csv(COLUMNS, rows)


def to_markdown(table: Table, notes: list[str]) -> str:
    """Return the table as Markdown, with the notes that the page has."""
    out = [f"# {_md(table.study.title)}", ""]
    for backbone, lines in table.groups():
        paper = lines[0].paper_backbone
        stands = f" (stands for {_md(papers.label('backbones', paper))})" if paper != backbone else ""
        out += [f"## {_md(papers.label('backbones', backbone))}{stands}", ""]
        heads = [
            f"{_md(papers.label('tasks', e.column.task))} {_md(papers.label('metrics', e.metric))}"
            for e in table.row(lines[0])
        ]
        columns = costs_of(table)
        heads += [f"{cost.title} ({cost.below})" for cost in columns]
        out += ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        for line in lines:
            spent = [cost_of(cost, table, line) or "-" for cost in columns]
            entries = [_md_entry(entry) for entry in table.row(line)]
            out.append("| " + " | ".join([_md(line.title), *entries, *spent]) + " |")
        out.append("")
    out += [f"- {_md(note)}" for note in notes]
    open_cells = [(entry, cell) for entry in table.entries.values() for cell in entry.open if not entry.column.metric]
    for entry, cell in open_cells:
        out.append(
            f"- {_md(entry.line.title)}, {_md(cell.task)}, seed {cell.seed}: **{cell.status}**"
            + (f": {_md(cell.error)}" if cell.error else "")
        )
    return "\n".join(out).rstrip() + "\n"


def to_latex(table: Table) -> str:
    """Return the table as a LaTeX `tabular` in the style of booktabs, to be read into a paper.

    The best of a column is bold, the second underlined; a value has its standard deviation over seeds behind it. The
    paper's own figures are left out.
    """
    costs = costs_of(table)
    entries, reference = table.row(table.lines[0]), table.reference_label
    heads = [(papers.label("tasks", e.column.task), metric_words(e, reference)) for e in entries]
    heads += [(cost.title, cost.below) for cost in costs]
    rows = [["Method", *(_tex(title) for title, _ in heads)], ["", *(_tex(below) for _, below in heads)]]
    out = [f"% {' '.join(table.study.title.split())}; needs the package booktabs",
           rf"\begin{{tabular}}{{@{{}}l{'r' * len(heads)}@{{}}}}", r"\toprule", *map(_tex_row, rows)]  # fmt: skip
    for backbone, lines in table.groups():
        out.append(r"\midrule")
        if len(table.groups()) > 1:
            name = _tex(papers.label("backbones", backbone))
            out.append(rf"\multicolumn{{{len(heads) + 1}}}{{@{{}}l}}{{\emph{{{name}}}}} \\")
        for line in lines:
            spent = [_tex(cost_of(cost, table, line) or "-") for cost in costs]
            out.append(_tex_row([_tex(line.title), *map(_tex_entry, table.row(line)), *spent]))
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_metrics(table: Table) -> str:
    """Return a study's numbers by task, metric and method, for `dvc metrics diff --targets`.

    By backbone first, where it has several.
    """
    several = len(table.groups()) > 1
    numbers: Tree = {}
    for line in table.lines:
        for entry in table.row(line):
            if entry.value is not None:
                place = [*([line.backbone] if several else []), entry.column.task, entry.metric, line.method]
                _put(numbers, place, _printed(entry))
    return _json(numbers)


def to_scores(tables: Sequence[Table]) -> str:
    """Return a row a number of several studies, for `dvc plots`; without its run, so that equal numbers are equal."""
    rows = []
    for table in tables:
        for line in table.lines:
            for entry in table.row(line):
                if entry.value is not None:
                    names = (table.study.study, line.backbone, entry.column.task, entry.metric, entry.unit)
                    rows.append((*names, line.method, format_value(entry.value, entry.unit)))
    return _csv(SCORES, rows)


def to_summary(tables: Sequence[Table]) -> str:
    """Return the few numbers of `dvc metrics show` and `dvc exp show`: by task, the score of a study's own method.

    That is the row which has its paper's name, else the last that trains, else the last, and of a curve the last point.
    Of several studies with the same row the first decides. Method and backbone are named where there are several.
    """
    rows: dict[tuple[str, str, str], float] = {}
    for table in tables:
        for backbone, lines in table.groups():
            named = [line for line in lines if line.row == table.study.study.partition("-")[0]]
            trained = [line for line in lines if any(c.trainable_parameters for e in table.row(line) for c in e.cells)]
            line = (named or trained or lines)[-1]
            for entry in table.row(line):
                if entry.column.metric is None and _is_score(entry):
                    rows.setdefault((entry.column.task, line.row, backbone), _printed(entry))
    several = [len({place[level] for place in rows}) > 1 for level in (1, 2)]
    numbers: Tree = {}
    for (task, *further), value in rows.items():
        _put(numbers, [task, *(name for name, wanted in zip(further, several, strict=True) if wanted)], value)
    return _json(numbers)


def _csv(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heads, *rows])
    return buffer.getvalue()


def number(value: float | None) -> str:
    """Return a number for the CSV: up to six decimals, nothing for none."""
    return "" if value is None else f"{value:.6f}".rstrip("0").rstrip(".")


def format_value(value: float, unit: str) -> str:
    """Return a number as the papers print its unit."""
    return f"{value:.{papers.decimals(unit)}f}"


def _is_score(entry: TableEntry) -> bool:
    return entry.value is not None and all(cell.measurement is None for cell in entry.done)


def _printed(entry: TableEntry) -> float:
    return float(format_value(entry.value or 0.0, entry.unit))


def _put(tree: Tree, place: Sequence[str], value: float) -> None:
    for name in place[:-1]:
        branch = tree.setdefault(name, {})
        assert isinstance(branch, dict)  # noqa: S101 - every number stands at the same depth
        tree = branch
    tree[place[-1]] = value


def _json(tree: Tree) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def _md_entry(entry: TableEntry) -> str:
    text = entry.absence
    if entry.value is not None:
        value = format_value(entry.value, entry.unit)
        spread = f" ± {format_value(entry.std, entry.unit)}" if entry.std is not None else ""
        text = {"best": f"**{value}**", "second": f"<u>{value}</u>"}.get(entry.mark, value) + spread
    return text if entry.paper is None else f"{text} (paper {format_value(entry.paper, entry.unit)})"


def _tex_entry(entry: TableEntry) -> str:
    if entry.value is None:
        return "-"
    marked = {"best": r"\textbf{%s}", "second": r"\underline{%s}"}.get(entry.mark or "", "%s")
    value = marked % format_value(entry.value, entry.unit)
    return value if entry.std is None else rf"{value} {{\scriptsize$\pm${format_value(entry.std, entry.unit)}}}"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return "".join(_TEX.get(letter, letter) for letter in " ".join(text.split()))


def _md(text: str) -> str:
    """Return text that Markdown shows as it is: no markup, no HTML, no end of the table's cell."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|!])", r"\\\1", text)


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
        problems = problems_of(self.of.study.cells)
        more = [f"and {len(problems) - _PROBLEMS} more"] if len(problems) > _PROBLEMS else []
        yield from (Text(problem, style=BAD) for problem in (*problems[:_PROBLEMS], *more))

    def _rows(self, lines: Sequence[Line], width: int) -> Iterator[RenderableType]:
        heads = ["method", *(papers.label("axes", axis) for axis in self.of.axes)]
        names = [self._name(line, before) for line, before in zip(lines, (None, *lines), strict=False)]
        taken = sum(_width(column) + _GAP for column in zip(heads, *names, strict=True))
        parts = [(column, self._parts(column, lines)) for column in self.of.columns]
        for nth, some in enumerate(_pieces(parts, width - taken)):
            made = terminal.table(*heads, right=heads[1:])
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
        return Text(entry.absence, style="" if entry.absence == "-" else BAD)
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
