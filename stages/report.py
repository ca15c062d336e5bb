"""DVC stage: a study's tables and figures; without a study, the page over all of them."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import report
from pipeline.config import Params
from pipeline.report import tracked
from stages.common import run

EVALUATIONS, REPORTS = Path("evaluations"), Path("reports")


def main(params: Params) -> None:
    if len(sys.argv) > 1:
        report.write_study(sys.argv[1], params, EVALUATIONS, REPORTS)
    else:
        index = report.write_index(params, EVALUATIONS, REPORTS)
        tracked.log(params, EVALUATIONS, Path.cwd())
        index.say_findings(params.run.studies)


if __name__ == "__main__":
    run(main)
