"""DVC stage: the tables and figures of the profile's studies, and the page over all that are evaluated."""

from __future__ import annotations

from pathlib import Path

from pipeline import report
from pipeline.config import Params
from pipeline.report import tracked
from stages.common import run

EVALUATIONS, REPORTS = Path("evaluations"), Path("reports")


def main(params: Params) -> None:
    for study in params.run.studies:
        report.write_study(study, params, EVALUATIONS, REPORTS)
    index = report.write_index(params, EVALUATIONS, REPORTS)
    tracked.log(params, EVALUATIONS, Path.cwd())
    index.say(params.run.studies)


if __name__ == "__main__":
    run(main)
