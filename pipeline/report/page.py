"""The HTML: one page over all studies, nothing fetched from anywhere. The only file that knows Jinja."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.config import Params
from pipeline.report import costs, papers
from pipeline.report.evaluations import Cell
from pipeline.report.files import shown
from pipeline.report.findings import OPEN, Finding
from pipeline.report.svg import safe
from pipeline.report.tables import Column, Entry, Line, Table

UI = "http://127.0.0.1:5000"  # where `hificl ui` listens
_SELECTION = {
    "selection": "Epoch and hyperparameters were chosen on a selection split held out of the training pool; "
    "the evaluation split was scored once.",
    "test": "Epoch and hyperparameters were chosen on the evaluation split itself, as the papers do: "
    "the numbers are optimistic.",
}


def _protocol(name: str | None) -> str:
    if name is None:
        return "Protocol: the papers' equations and prompts, every choice as its section of params.yaml has it."
    return f"Protocol: {name}, the choices under protocols.{name} in params.yaml all together (docs/methods.md)."


def notes(table: Table) -> list[str]:
    """Return what has to be known to read a study's numbers."""
    out = [table.note] if table.note else []
    out += [_protocol(table.study.protocol)]
    out += [_SELECTION.get(table.study.selection, f"Selection: {table.study.selection}.")]
    for stand_in, paper in _stand_ins([table]):
        out.append(f"{stand_in} stands for {paper}: the paper's numbers are of that model, so no difference is shown.")
    return out


def section(
    table: Table, source: papers.Source | None, figures: dict[str, tuple[str, str]], gallery: Any, ui: str
) -> str:
    """Return a study's part of the page."""
    return _environment().get_template("study.html.j2").render(study=_study(table, source, figures, gallery), ui=ui)


def page(tables: list[Table], sections: list[str], params: Params, found: list[Finding]) -> str:
    """Return the whole page.

    Args:
        tables: every study, laid out.
        sections: the studies' parts, in the same order.
        params: for the address of the MLflow UI.
        found: the papers' findings and what became of them.
    """
    studies = [
        {
            "name": t.study.study,
            "title": t.study.title,
            "done": _done(t),
            "total": len(t.study.cells),
            "html": Markup(html),  # noqa: S704 - rendered by our own template with autoescape
        }
        for t, html in zip(tables, sections, strict=True)
    ]
    pairs = _stand_ins(tables)
    words = "; ".join(f"{ours} stands for {theirs}" for ours, theirs in pairs)
    stand_ins = (
        f"{words}. The paper's numbers are of the large models on the full tasks: compare the order of the "
        "methods, not the heights. No difference is shown between unlike models."
        if pairs
        else ""
    )
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            studies=studies,
            origins=_origins(tables),
            ui=ui_address(params),
            stand_ins=stand_ins,
            findings=[one for one in found if one.verdict != OPEN],
            num_findings=len(found),
            profile=", ".join(dict.fromkeys(t.study.profile for t in tables)) or params.profile,
            done=sum(s["done"] for s in studies),
            total=sum(s["total"] for s in studies),
        )
    )


def ui_address(params: Params) -> str:
    """Return where runs are looked at: the tracking server, or the local UI over the embedded store."""
    uri = params.tracking.uri or ""
    return uri.rstrip("/") if uri.startswith(("http://", "https://")) else UI


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(shown=shown, signed=_signed, label=papers.label)
    return environment


def _study(
    table: Table, source: papers.Source | None, figures: dict[str, tuple[str, str]], gallery: Any
) -> dict[str, Any]:
    study, columns = table.study, costs.known(table)
    every = notes(table)
    if source and source.note:
        every.append(f"{source.paper}, {source.place}: {source.note}.")
    return {
        "name": study.study,
        "title": study.title,
        "source": source if source and source.place else None,
        "done": _done(table),
        "total": len(study.cells),
        "gone": len(study.cells) - _done(table),
        "code": _code(study.provenance),
        "notes": every,
        "problems": _problems(study.cells),
        "costs": columns,
        "heads": [_head(table, column) for column in table.columns],
        "groups": [
            {
                "title": papers.label("backbones", backbone),
                "below": f"stands for {papers.label('backbones', lines[0].paper_backbone)}"
                if backbone != lines[0].paper_backbone
                else "",
                "rows": [_row(table, line, source, columns) for line in lines],
            }
            for backbone, lines in table.groups()
        ],
        "figures": [
            {"svg": Markup(svg), "words": words, "caption": _caption(table, name)}  # noqa: S704 - our own SVG
            for name, (svg, words) in figures.items()
        ],
        "shape": len(table.columns) + 1 + len(columns),
        "figures_first": bool(table.axes),
        "gallery": gallery,
        "reference": next((line.label for line in table.lines if line.row == table.reference), ""),
        "differences": [entry for entry in table.entries.values() if entry.difference],
        "runs": [
            {
                "title": entry.line.title,
                "backbone": papers.label("backbones", entry.line.backbone),
                "task": papers.label("tasks", entry.column.task),
                "cell": cell,
                "chosen": ", ".join(f"{key} = {_short(value)}" for key, value in cell.searched.items()),
                "value": ""
                if cell.value is None
                else shown(papers.convert(cell.value, cell.unit or entry.unit, entry.unit), entry.unit),
            }
            for entry in table.entries.values()
            if entry.column.metric is None
            for cell in entry.cells
        ],
    }


def _row(table: Table, line: Line, source: papers.Source | None, columns: Sequence[costs.Cost]) -> dict[str, Any]:
    printed = papers.figure(source.path, line.paper_backbone, line.row, "params_m") if source else None
    size = f"{printed:g} M" if printed is not None else ""
    return {
        "title": line.title,
        "entries": table.row(line),
        "costs": [
            {
                "title": cost.title,
                "text": costs.of_row(cost, table, line),
                "paper": size if cost.field == "trainable_parameters" else "",
            }
            for cost in columns
        ],
    }


def _head(table: Table, column: Column) -> dict[str, str]:
    entry: Entry = table.entries[table.lines[0], column]
    unit = papers.sign(entry.unit)
    metric = papers.label("metrics", entry.metric) + (f" ({unit})" if unit else "")
    lower = papers.metric_facts(entry.metric).get("lower_is_better")
    own = papers.label("tasks", column.task)
    stands = f"{own} for {papers.label('tasks', column.paper_task)}" if column.task != column.paper_task else own
    return {
        "title": metric if column.metric else own,
        "below": f"{stands}{', lower is better' if lower else ''}"
        if column.metric
        else (
            metric if column.task == column.paper_task else f"{metric}; for {papers.label('tasks', column.paper_task)}"
        ),
    }


def _caption(table: Table, name: str) -> str:
    bars = name.startswith("bars-")
    shown = [entry for entry in table.entries.values() if f"bars-{safe(entry.line.backbone)}" == name]
    printed = [entry for entry in shown if entry.paper is not None]
    own = any(not entry.comparable for entry in printed)
    parts = [f"Above: ours. Below, hollow: the paper's{', on axes of their own' if own else ''}."] if printed else []
    repeated = any(entry.std is not None for entry in table.entries.values())
    parts.append(f"{'Whiskers' if bars else 'Bands'}: one standard deviation over seeds." if repeated else "One seed.")
    return " ".join(parts)


def _problems(cells: list[Cell]) -> list[str]:
    """Return what is not there, one sentence for all seeds of the same trouble."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        if cell.status != "done":
            where = [cell.label, papers.label("backbones", cell.backbone), papers.label("tasks", cell.task)]
            where += [f"{axis} = {value}" for axis, value in cell.vary.items()]
            what = f"{cell.status}. {cell.error}" if cell.error else cell.status
            seeds.setdefault((", ".join(where), what), []).append(cell.seed)
    return [
        f"{where}, seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}: {what}"
        for (where, what), numbers in seeds.items()
    ]


def _stand_ins(tables: list[Table]) -> list[tuple[str, str]]:
    pairs = {
        (papers.label("backbones", line.backbone), papers.label("backbones", line.paper_backbone)): None
        for table in tables
        for line in table.lines
        if line.backbone != line.paper_backbone
    }
    return list(pairs)


def _origins(tables: list[Table]) -> list[dict[str, Any]]:
    """Return each distinct origin once, with the studies that have it."""
    seen: dict[str, dict[str, Any]] = {}
    for table in tables:
        origin = table.study.provenance
        facts: list[tuple[str, str]] = [("Code", _code(origin, whole=True) or "no commit recorded")]
        versions = origin.get("versions")
        if isinstance(versions, dict):
            facts.append(("Versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)))
        machine = origin.get("machine")
        if isinstance(machine, dict):
            shown_machine = [f"{key} {_short(value)}" for key, value in machine.items() if value]
            facts.append(("Machine", ", ".join(shown_machine)))
        data = origin.get("data")
        if isinstance(data, dict) and data.get("params"):
            facts.append(("params.yaml", f"md5 {data['params']}"))
        entry = seen.setdefault(repr(facts), {"facts": facts, "names": []})
        entry["names"].append(table.study.study)
    return [{"facts": one["facts"], "studies": ", ".join(one["names"])} for one in seen.values()]


def _code(origin: dict[str, Any], whole: bool = False) -> str:
    commit = origin.get("commit")
    if not commit:
        return str(origin.get("note") or "")
    text = str(commit) if whole else str(commit)[:10]
    return f"{text} with uncommitted changes" if origin.get("dirty") else text


def _done(table: Table) -> int:
    return sum(cell.status == "done" and cell.value is not None for cell in table.study.cells)


def _signed(value: float, unit: str) -> str:
    text = f"{value:+.{papers.decimals(unit)}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
