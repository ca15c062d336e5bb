"""Studies' tables and findings inside a document, between marks: what the model card prints is what a study printed."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline import report
from pipeline.config import Params
from pipeline.marks import fill
from pipeline.records.evaluations import Evaluations
from pipeline.report import files, findings

_MARKS = re.compile(
    r"(?P<open><!-- (?P<what>study|findings) (?P<name>[\w-]+): written by `hificl gallery` -->)\n.*?"
    r"(?P<close><!-- end of (?P=name) -->)",
    re.DOTALL,
)
_WAY_OUT = "Add <!-- study NAME: written by `hificl gallery` --> and <!-- end of NAME -->, one below the other"


def write_into(path: Path, params: Params, evaluations: Path) -> int:
    """Fill a document's marks from the studies that have been evaluated; return how many were filled.

    `study NAME` gets that study's table, `findings PAPER` what became of that paper's findings (`miniature`: of what
    the miniature must show). A study that has not been evaluated stays as it is, and so do findings where no study of
    theirs has.

    Raises:
        InputError: the document is missing or has no marks, or a study's file breaks the schema.
    """
    present = Evaluations(evaluations).studies()

    def made(match: re.Match[str]) -> str | None:
        name = match["name"]
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
    lines = files.to_markdown(report.load_table(study, params, evaluations), []).strip().splitlines()[2:]
    return "\n".join(re.sub(r"^## (.*)", r"**\1**", line) for line in lines)
