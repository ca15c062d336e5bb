"""The report: every study's table and figures beside the paper's, as HTML, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.config.load import Params
from pipeline.core.copies import is_copy
from pipeline.core.files import write_atomic
from pipeline.core.progress import console, say
from pipeline.records.evaluation import Evaluations
from pipeline.report import figures, findings, page, papers, tables, writers
from pipeline.report.answers import answer_table
from pipeline.report.drawing import PRINTED, Drawing, standalone
from pipeline.report.sections import notes
from pipeline.report.writers import Results

__all__ = ["Index", "forget", "load_table", "study_page", "write_index", "write_numbers", "write_study"]


class RenderedStudy(NamedTuple):
    """A study laid out, its figures by name, and its section of the page."""

    table: tables.Table
    figures: dict[str, Drawing]
    section: str


# by the content of the study's file: the index shows what was written just before
_rendered: dict[tuple[str, str, str], RenderedStudy] = {}


def load_table(study: str, params: Params, evaluations: Path) -> tables.Table:
    """Return a study laid out as the paper prints it.

    Raises:
        InputError: the study has not been evaluated, or its file breaks the schema.
    """
    return tables.build(Evaluations(evaluations).study(study), params, evaluations)


def write_study(study: str, params: Params, evaluations: Path, out: Path, *, for_paper: bool = True) -> None:
    """Write a study's report: `<study>.md`, `.csv`, `metrics/<study>.json`, and its figures in `figures/<study>/`.

    `for_paper` adds what a paper takes: `<study>.tex`, and each figure as PDF and PNG beside SVG. Equal inputs give
    equal bytes.

    Raises:
        InputError: the study has not been evaluated, or its file breaks the schema.
    """
    table, drawn, _ = _render(study, params, evaluations)
    pictures = out / "figures" / study
    for stale in pictures.glob("*"):
        stale.unlink()
    for folder in (pictures, out / "metrics"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{study}.csv", writers.to_csv(table))
    write_atomic(out / f"{study}.md", writers.to_markdown(table, notes(table)))
    write_atomic(out / "metrics" / f"{study}.json", writers.to_metrics(table))
    for name, drawing in drawn.items():
        write_atomic(pictures / f"{name}.svg", standalone(drawing.svg))
    if not for_paper:
        return
    write_atomic(out / f"{study}.tex", writers.to_latex(table))
    for name, drawing in drawn.items():
        for kind in PRINTED:
            write_atomic(pictures / f"{name}.{kind}", drawing.printed(kind))


def write_numbers(params: Params, evaluations: Path, out: Path) -> None:
    """Write what DVC compares, `metrics.json` and `scores.csv`: the numbers of the profile's studies.

    Raises:
        InputError: a study has not been evaluated, or its file breaks the schema.
    """
    tables_in = [_render(study, params, evaluations)[0] for study in params.run.studies]
    write_atomic(out / "metrics.json", writers.to_summary(tables_in))
    write_atomic(out / "scores.csv", writers.to_scores(tables_in))


@dataclass(frozen=True)
class Index:
    """What `write_index` made: the page, every evaluated study's table by name, every claim with its verdict."""

    page: Path
    tables: dict[str, tables.Table]
    claims: list[findings.CheckedClaim]

    def say(self, studies: Iterable[str]) -> None:
        """Show what studies came out as, and what became of the claims about them; say where the page is.

        A study that is not evaluated and claims that nothing was measured for are left out.
        """
        for name in [name for name in studies if name in self.tables]:
            console.print("", Results(self.tables[name]), "")
            for checked in self.claims:
                if checked.claim.study == name and checked.verdict != findings.OPEN:
                    say(f"{checked.verdict}: {checked.claim.claim} ({checked.claim.paper})")
        if not is_copy(self.page.parent):  # DVC takes a copy away, and keeps what it wrote
            say(f"\nreport: {self.page.resolve()}")


def write_index(params: Params, evaluations: Path, out: Path) -> Index:
    """Write `index.html`, one page over all studies that have been evaluated, and `findings.md`.

    Studies stand in the order of `Params.studies`, and after them those that have no file any more.
    """
    present = Evaluations(evaluations).studies()
    order = [name for name in params.studies if name in present]
    order += [name for name in present if name not in params.studies]
    rendered = [_render(name, params, evaluations) for name in order]
    tables_in = [table for table, _, _ in rendered]
    claims = findings.check_claims(tables_in, evaluations)
    if all(table.paper is None for table in tables_in):  # what the papers found is none of theirs
        claims = [checked for checked in claims if checked.verdict != findings.OPEN]
    html = page.page(tables_in, [section for _, _, section in rendered], params, claims)
    if claims:
        write_atomic(out / "findings.md", findings.claims_markdown(claims))
    write_atomic(out / "index.html", html)
    return Index(out / "index.html", dict(zip(order, tables_in, strict=True)), claims)


def study_page(study: str, params: Params, evaluations: Path) -> tuple[tables.Table, str]:
    """Return one study, laid out, and its page, which needs no other file."""
    table, _, section = _render(study, params, evaluations)
    return table, page.page([table], [section], params, [])


def _render(study: str, params: Params, evaluations: Path) -> RenderedStudy:
    definition = params.studies.get(study)
    read = Evaluations(evaluations).study(study)
    asked = f"{definition!r} {params.backbones!r} {params.tracking!r}"
    key = (str(evaluations.resolve()), read.model_dump_json(), asked)
    if key not in _rendered:
        table = tables.build(read, params, evaluations)
        layout = definition.layout if definition else "table"
        drawn = {**figures.draw_figures(table, layout), **figures.draw_layers(table), **figures.draw_losses(table)}
        answers = answer_table(table, evaluations) if layout == "gallery" else None
        printed = papers.paper_table(definition.paper if definition else None)
        section = page.section_html(table, printed, drawn, answers, page.ui_address(params))
        _rendered[key] = RenderedStudy(table, drawn, section)
    return _rendered[key]


def forget() -> None:
    """Forget what was rendered, as a new process would."""
    _rendered.clear()
