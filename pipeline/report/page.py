"""The HTML: one page over all studies, nothing fetched from anywhere. The only file that knows Jinja."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.config.load import Params
from pipeline.report import papers, sections
from pipeline.report.answers import AnswerTable
from pipeline.report.drawing import Drawing
from pipeline.report.findings import METHOD, OPEN, CheckedClaim
from pipeline.report.sections import stand_ins
from pipeline.report.tables import Table
from pipeline.report.writers import format_value

_HERE = Path(__file__).with_name("templates")
_FEW = 6  # up to so many studies are open at first
_OWN = "Other studies"  # the menu's last group


@dataclass(frozen=True)
class Outline:
    """What the menu and a study's first line say, and what the filter looks through.

    Attributes:
        short: the title without its paper's name, for the menu.
        printed: where the paper prints it, or None.
        done: cells that have their number, of `total`.
        words: all that the filter finds the study by, in lower case.
        best: which row is best at each task.
        html: the study's section.
    """

    name: str
    title: str
    short: str
    printed: papers.PaperTable | None
    done: int
    total: int
    words: str
    best: str
    html: Markup


@dataclass(frozen=True)
class MenuGroup:
    """One paper's studies in the menu."""

    title: str
    studies: list[Outline]


@dataclass(frozen=True)
class ClaimGroup:
    """One paper's claims, and how many came out how."""

    title: str
    verdicts: str
    claims: list[CheckedClaim]


@dataclass(frozen=True)
class Origin:
    """Code, machine and data that studies were computed with, by name, and the studies."""

    facts: tuple[tuple[str, str], ...]
    studies: str


def section_html(
    table: Table,
    printed: papers.PaperTable | None,
    figures: dict[str, Drawing],
    answers: AnswerTable | None,
    ui: str,
) -> str:
    """Return a study's section of the page; `ui` is where everyone finds the runs, or nothing."""
    study = sections.study_section(table, printed, figures, answers)
    return _environment().get_template("study.html.j2").render(study=study, ui=ui)


def page(tables: list[Table], parts: list[str], params: Params, claims: list[CheckedClaim]) -> str:
    """Return the whole page over studies and their parts, in the same order, with the papers' claims."""
    outlines = [
        _outline(table, Markup(part))  # noqa: S704 - rendered by our own template with autoescape
        for table, part in zip(tables, parts, strict=True)
    ]
    studies = sorted(outlines, key=lambda study: _order(study.printed))
    groups: dict[str, list[Outline]] = {}
    for study in studies:
        groups.setdefault(study.printed.paper if study.printed else _OWN, []).append(study)
    measured = [checked for checked in claims if checked.verdict != OPEN]
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            studies=studies,
            groups=[MenuGroup(title, of_group) for title, of_group in groups.items()],
            open=len(studies) <= _FEW,
            origins=_origins(tables),
            ui=ui_address(params),
            stand_ins=_stand_ins(tables),
            of_papers=[title for title in groups if title != _OWN],
            printed=_printed(tables),
            findings=_claims_by_paper(measured),
            num_measured=len(measured),
            num_findings=len(claims),
            method=METHOD.replace("`", ""),
            profile=", ".join(dict.fromkeys(table.study.profile for table in tables)) or params.profile,
            done=sum(study.done for study in studies),
            total=sum(study.total for study in studies),
            script=Markup(script),  # noqa: S704 - our own file
            policy=_policy(script),
        )
    )


def ui_address(params: Params) -> str:
    """Return where a reader finds the runs: a tracking server, nothing where one machine alone has them."""
    parts = urlsplit(params.tracking.uri or "")
    host = (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    try:
        here = ip_address(host).is_loopback
    except ValueError:
        here = host in ("", "localhost")
    return "" if here else parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


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
    environment.globals.update(format_value=format_value, signed=_signed, label=papers.label)
    return environment


def _outline(table: Table, html: Markup) -> Outline:
    study, printed = table.study, papers.paper_table(table.paper)
    words = [study.study, study.title, *(line.title for line in table.lines)]
    words += [papers.label("backbones", line.backbone) for line in table.lines]
    words += [papers.label("tasks", column.task) for column in table.columns]
    short = re.sub(rf"^{re.escape(printed.paper)}[ ,:]+", "", study.title) if printed else study.title
    return Outline(
        name=study.study,
        title=study.title,
        short=short[:1].upper() + short[1:],
        printed=printed,
        done=sections.done(table),
        total=len(study.cells),
        words=" ".join(dict.fromkeys(words)).lower(),
        best=_best(table),
        html=html,
    )


def _order(printed: papers.PaperTable | None) -> tuple[bool, str, bool, int]:
    """Return where a study stands: paper by paper, tables before figures, by their numbers; then those of no paper."""
    if printed is None:
        return True, "", False, 0
    kind, _, number = printed.place.partition(" ")
    return False, printed.paper, kind == "Figure", int(number) if number.isdecimal() else 0


def _best(table: Table) -> str:
    """Say which row is best at each task, on the first backbone."""
    sentences = []
    for column in table.columns:
        first = [table.entries[line, column] for _, lines in table.groups()[:1] for line in lines]
        best = [entry for entry in first if entry.mark == "best" and column.metric is None]
        if best:
            rows = ", ".join(entry.line.title for entry in best)
            sentences.append(
                f"{papers.label('tasks', column.task)} {rows} {format_value(best[0].value or 0.0, best[0].unit)}"
            )
    return "; ".join(sentences)


def _claims_by_paper(measured: list[CheckedClaim]) -> list[ClaimGroup]:
    groups: dict[str, list[CheckedClaim]] = {}
    for checked in measured:
        groups.setdefault(checked.claim.paper, []).append(checked)
    counts = {paper: Counter(checked.verdict for checked in claims) for paper, claims in groups.items()}
    return [
        ClaimGroup(paper, ", ".join(f"{verdict} {count}" for verdict, count in counts[paper].items()), claims)
        for paper, claims in groups.items()
    ]


def _printed(tables: list[Table]) -> bool:
    return any(entry.paper is not None for table in tables for entry in table.entries.values())


def _stand_ins(tables: list[Table]) -> str:
    words = "; ".join(f"{stand_in} stands for {model}" for stand_in, model in stand_ins(tables))
    if not words or not _printed(tables):
        return words and words + "."
    return (
        f"{words}. The paper's numbers are of the large models on the full tasks: compare the order of the "
        "methods, not the heights. No difference is shown between unlike models."
    )


def _origins(tables: list[Table]) -> list[Origin]:
    """Return each distinct origin once, with the studies that have it."""
    studies: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for table in tables:
        origin = table.study.provenance
        facts: list[tuple[str, str]] = [("Code", sections.code(origin, whole=True) or "no commit recorded")]
        if origin.versions:
            versions = (f"{name} {value}" for name, value in origin.versions.items() if value)
            facts.append(("Versions", ", ".join(versions)))
        machine = [f"{name} {sections.short_value(value)}" for name, value in sorted(origin.machine) if value]
        if machine:
            facts.append(("Machine", ", ".join(machine)))
        if origin.data.params:
            facts.append(("params.yaml, profiles, studies", f"md5 {origin.data.params}"))
        studies.setdefault(tuple(facts), []).append(table.study.study)
    return [Origin(facts, ", ".join(names)) for facts, names in studies.items()]


def _signed(value: float, unit: str) -> str:
    text = f"{value:+.{papers.decimals(unit)}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")
