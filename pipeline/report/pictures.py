"""A page of the report's figures for the documentation: `hificl gallery`."""

from __future__ import annotations

from pathlib import Path

from pipeline import report
from pipeline.atomic import write_atomic
from pipeline.config import Params
from pipeline.report import evaluations as files_in
from pipeline.report import figures

_FOLDER = "images/gallery"
_HEAD = """# The report's pictures

The first figure of every study that has been evaluated, as the report shows it; the tables, the qualitative pages
and the loss curves are in `reports/index.html`. Made by `hificl gallery` from
the evaluations at hand, profile `{profile}`.
"""


def write_gallery(params: Params, evaluations: Path, page: Path) -> list[str]:
    """Write a Markdown page with each evaluated study's first figure, and the figures beside it.

    Args:
        params: for the studies' order and layouts.
        evaluations: what stage `evaluate` wrote.
        page: the Markdown file; figures go to `images/gallery/` beside it, where those of before are removed.

    Returns:
        The studies that are shown.

    Raises:
        InputError: a study's file breaks the schema.
    """
    present = files_in.study_names(evaluations)
    order = [name for name in params.studies if name in present]
    folder = page.parent / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.svg"):
        stale.unlink()
    parts, shown = [_HEAD.format(profile=params.profile)], []
    for study in order:
        table = report.load_table(study, params, evaluations)
        drawn = figures.draw(table, params.studies[study].layout)
        if not drawn:
            continue
        name, (svg, words) = next(iter(drawn.items()))
        file = folder / f"{study}-{figures.safe(name)}.svg"
        write_atomic(file, figures.standalone(svg))
        note = f"\n{table.note}\n" if table.note else ""
        alt = " ".join(words.replace("[", "(").replace("]", ")").split())
        parts.append(f"## {table.study.title}\n\n![{alt}]({_FOLDER}/{file.name})\n{note}")
        shown.append(study)
    write_atomic(page, "\n".join(parts))
    return shown
