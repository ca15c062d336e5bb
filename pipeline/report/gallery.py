"""A page of the report's figures for the documentation: `hificl gallery`."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline import report
from pipeline.config.load import Params
from pipeline.core.errors import InputError
from pipeline.core.files import fill, write_atomic
from pipeline.records.evaluation import Evaluations
from pipeline.report import figures, findings, writers
from pipeline.report.drawing import safe, standalone

_FOLDER = "images/gallery"
_HEAD = """# The report's pictures

The first figure of every study that has been evaluated, and its figures by layer, as the report shows them; the
tables, the qualitative pages and the loss curves are in `reports/index.html`. Made by `hificl gallery` from
the evaluations at hand, profile `{profile}`.
"""
_KEPT = "\nKept from an earlier run: this study was not evaluated in the last one.\n"


def write_gallery(params: Params, evaluations: Path, page: Path) -> list[str]:
    """Write a Markdown page with each evaluated study's first figure, those by layer, and the figures beside it.

    A study that the page shows and that is not evaluated here keeps its section, which says so.

    Args:
        params: for the studies' order and layouts.
        evaluations: what stage `evaluate` wrote.
        page: the Markdown file; figures go to `images/gallery/` beside it, where those not on the page are removed.

    Returns:
        The studies that were drawn.

    Raises:
        InputError: a study's file breaks the schema.
    """
    present = Evaluations(evaluations).studies()
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    folder = page.parent / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    parts, drawn = [_HEAD.format(profile=params.profile)], []
    for study in params.studies:
        if study not in present:
            parts.append(_section_of_before(study, before))
        elif section := _section(study, params, evaluations, folder):
            parts.append(section)
            drawn.append(study)
    text = "\n".join(part for part in parts if part)
    write_atomic(page, text)
    for picture in folder.glob("*.svg"):
        if f"({_FOLDER}/{picture.name})" not in text:
            picture.unlink()
    return drawn


def _section(study: str, params: Params, evaluations: Path, folder: Path) -> str:
    """Write a study's first figure, and those by layer, and return its section; nothing where there is none."""
    table = report.load_table(study, params, evaluations)
    drawn = [*figures.draw_figures(table, params.studies[study].layout).items()][:1]
    pictures = ""
    for name, drawing in [*drawn, *figures.draw_layers(table).items()]:
        file = folder / f"{study}-{safe(name)}.svg"
        write_atomic(file, standalone(drawing.svg))
        alt = " ".join(drawing.words.replace("[", "(").replace("]", ")").split())
        pictures += f"\n![{alt}]({_FOLDER}/{file.name})\n"
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {table.study.title}\n{pictures}{note}" if pictures else ""


def _section_of_before(study: str, before: str) -> str:
    of_study = re.compile(rf"\({_FOLDER}/{re.escape(study)}-(bars|over|cost)-")
    section = next((part for part in re.split(r"(?m)^(?=## )", before) if of_study.search(part)), "")
    return section and section.replace(_KEPT, "").rstrip("\n") + "\n" + _KEPT


_MARKS = re.compile(
    r"(?P<open><!-- (?P<what>study|findings) (?P<name>[\w-]+) under (?P<profile>[\w-]+): written by"
    r" `hificl gallery` -->)\n.*?"
    r"(?P<close><!-- end of (?P=name) -->)",
    re.DOTALL,
)
_OF_NO_PROFILE = re.compile(r"(<!-- (?:study|findings) [\w-]+)(: written by `hificl gallery` -->)")
_WAY_OUT = (
    "Add <!-- study NAME under PROFILE: written by `hificl gallery` --> and <!-- end of NAME -->, one below the other"
)


def write_into(path: Path, params: Params, evaluations: Path) -> int:
    """Fill a document's marks from the studies that have been evaluated; return how many were filled.

    `study NAME` gets that study's table, `findings PAPER` what became of that paper's findings (`miniature`: of what
    the miniature must show). A study that has not been evaluated stays as it is, and so do findings where no study of
    theirs has. What was played under another profile than the mark names is not what it shows, and stays too.

    Raises:
        InputError: the document is missing or has no marks or one without a profile, or a study's file breaks the
            schema.
    """
    if path.is_file() and (bare := _OF_NO_PROFILE.search(path.read_text(encoding="utf-8"))):
        way_out = f"Name the one it is played under: {bare[1]} under {params.profile}{bare[2]}"
        raise InputError("a mark names no profile", where=str(path), way_out=way_out)
    present = Evaluations(evaluations).studies()

    def made(match: re.Match[str]) -> str | None:
        name = match["name"]
        if match["profile"] != params.profile:
            return None
        if match["what"] == "study":
            return _table(name, params, evaluations) if name in present else None
        asked = {claim.study for claim in findings.claims() if claim.paper == name}
        if not asked & set(present):
            return None
        tables = [report.load_table(study, params, evaluations) for study in sorted(asked & set(present))]
        checked = [checked for checked in findings.check_claims(tables, evaluations) if checked.claim.paper == name]
        return "\n".join(findings.claims_markdown(checked).splitlines()[2:])

    return fill(path, _MARKS, _WAY_OUT, made)


def _table(study: str, params: Params, evaluations: Path) -> str:
    lines = writers.to_markdown(report.load_table(study, params, evaluations), []).strip().splitlines()[2:]
    return "\n".join(re.sub(r"^## (.*)", r"**\1**", line) for line in lines)
