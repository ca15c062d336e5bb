"""The HTML: one page over all studies, nothing fetched from anywhere. The only file that knows Jinja."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.config import Params
from pipeline.report import papers, sections
from pipeline.report.files import shown
from pipeline.report.findings import OPEN, Finding
from pipeline.report.notes import notes, stand_ins
from pipeline.report.tables import Table

__all__ = ["notes", "page", "section", "ui_address"]

_HERE = Path(__file__).with_name("templates")
_FEW = 6  # up to so many studies are open at first
_OWN = "Other studies"  # the menu's last group


def section(
    table: Table, source: papers.Source | None, figures: dict[str, tuple[str, str]], gallery: Any, ui: str
) -> str:
    """Return a study's part of the page; `ui` is where everyone finds the runs, or nothing."""
    study = sections.study(table, source, figures, gallery)
    return _environment().get_template("study.html.j2").render(study=study, ui=ui)


def page(tables: list[Table], parts: list[str], params: Params, found: list[Finding]) -> str:
    """Return the whole page.

    Args:
        tables: every study, laid out.
        parts: the studies' parts, in the same order.
        params: for the studies' papers and the address of the runs.
        found: the papers' findings and what became of them.
    """
    outlines = [
        _outline(table, Markup(part))  # noqa: S704 - rendered by our own template with autoescape
        for table, part in zip(tables, parts, strict=True)
    ]
    studies = sorted(outlines, key=lambda study: _order(study["source"]))
    groups: dict[str, list[dict[str, Any]]] = {}
    for study in studies:
        groups.setdefault(study["source"].paper if study["source"] else _OWN, []).append(study)
    measured = [one for one in found if one.verdict != OPEN]
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            studies=studies,
            groups=[{"title": title, "studies": of_group} for title, of_group in groups.items()],
            open=len(studies) <= _FEW,
            origins=_origins(tables),
            ui=ui_address(params),
            stand_ins=_stand_ins(tables),
            of_papers=[title for title in groups if title != _OWN],
            printed=_printed(tables),
            findings=_findings(measured),
            num_measured=len(measured),
            num_findings=len(found),
            profile=", ".join(dict.fromkeys(table.study.profile for table in tables)) or params.profile,
            done=sum(study["done"] for study in studies),
            total=sum(study["total"] for study in studies),
            script=Markup(script),  # noqa: S704 - our own file
            policy=_policy(script),
        )
    )


def ui_address(params: Params) -> str:
    """Return where a reader finds the runs: a tracking server, nothing where one machine alone has them."""
    uri = params.tracking.uri or ""
    host = (urlsplit(uri).hostname or "") if uri.startswith(("http://", "https://")) else ""
    try:
        here = ip_address(host).is_loopback
    except ValueError:
        here = host in ("", "localhost")
    return "" if here else uri.rstrip("/")


def _policy(script: str) -> str:
    """Return the page's content security policy: nothing from anywhere, and no script but our own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = ("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'")
    return "; ".join([*parts, "base-uri 'none'", "form-action 'none'"])


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(shown=shown, signed=_signed, label=papers.label)
    return environment


def _outline(table: Table, html: Markup) -> dict[str, Any]:
    """Return what the menu and a study's first line say, and what the filter looks through."""
    study, source = table.study, papers.source(table.paper)
    words = [study.study, study.title, *(line.title for line in table.lines)]
    words += [papers.label("backbones", line.backbone) for line in table.lines]
    words += [papers.label("tasks", column.task) for column in table.columns]
    named = re.sub(rf"^{re.escape(source.paper)}[ ,:]+", "", study.title) if source else study.title
    return {
        "name": study.study,
        "title": study.title,
        "short": named[:1].upper() + named[1:],
        "source": source,
        "done": sections.done(table),
        "total": len(study.cells),
        "words": " ".join(dict.fromkeys(words)).lower(),
        "best": _best(table),
        "html": html,
    }


def _order(source: papers.Source | None) -> tuple[Any, ...]:
    """Return where a study stands: paper by paper, tables before figures, by their numbers; then those of no paper."""
    if source is None:
        return (True,)
    kind, _, number = source.place.partition(" ")
    return False, source.paper, kind == "Figure", int(number) if number.isdecimal() else 0


def _best(table: Table) -> str:
    """Say which row is best at each task, on the first backbone."""
    found = []
    for column in table.columns:
        first = [table.entries[line, column] for _, lines in table.groups()[:1] for line in lines]
        best = [entry for entry in first if entry.mark == "best" and column.metric is None]
        if best:
            rows = ", ".join(entry.line.title for entry in best)
            found.append(f"{papers.label('tasks', column.task)} {rows} {shown(best[0].value or 0.0, best[0].unit)}")
    return "; ".join(found)


def _findings(measured: list[Finding]) -> list[dict[str, Any]]:
    """Return the findings by paper, with how many came out how."""
    groups: dict[str, list[Finding]] = {}
    for one in measured:
        groups.setdefault(one.claim.paper, []).append(one)
    return [
        {
            "title": paper,
            "verdicts": ", ".join(f"{verdict} {count}" for verdict, count in Counter(o.verdict for o in of).items()),
            "findings": of,
        }
        for paper, of in groups.items()
    ]


def _printed(tables: list[Table]) -> bool:
    return any(entry.paper is not None for table in tables for entry in table.entries.values())


def _stand_ins(tables: list[Table]) -> str:
    words = "; ".join(f"{ours} stands for {theirs}" for ours, theirs in stand_ins(tables))
    if not words or not _printed(tables):
        return words and words + "."
    return (
        f"{words}. The paper's numbers are of the large models on the full tasks: compare the order of the "
        "methods, not the heights. No difference is shown between unlike models."
    )


def _origins(tables: list[Table]) -> list[dict[str, Any]]:
    """Return each distinct origin once, with the studies that have it."""
    seen: dict[str, dict[str, Any]] = {}
    for table in tables:
        origin = table.study.provenance
        facts: list[tuple[str, str]] = [("Code", sections.code(origin, whole=True) or "no commit recorded")]
        versions = origin.get("versions")
        if isinstance(versions, dict):
            facts.append(("Versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)))
        machine = origin.get("machine")
        if isinstance(machine, dict):
            named = [f"{key} {sections.short(value)}" for key, value in machine.items() if value]
            facts.append(("Machine", ", ".join(named)))
        data = origin.get("data")
        if isinstance(data, dict) and data.get("params"):
            facts.append(("params.yaml, profiles, studies", f"md5 {data['params']}"))
        entry = seen.setdefault(repr(facts), {"facts": facts, "names": []})
        entry["names"].append(table.study.study)
    return [{"facts": one["facts"], "studies": ", ".join(one["names"])} for one in seen.values()]


def _signed(value: float, unit: str) -> str:
    text = f"{value:+.{papers.decimals(unit)}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")
