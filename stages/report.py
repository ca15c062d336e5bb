"""DVC stage: the tables and figures of every study that is evaluated, the page over them, and the numbers for DVC."""

from __future__ import annotations

from pathlib import Path

from pipeline import report
from pipeline.config.load import Params
from pipeline.records.evaluation import Evaluations
from pipeline.report import mlflow_report
from stages.common import run

EVALUATIONS, REPORTS = Path("evaluations"), Path("reports")


def main(params: Params) -> None:
    for study in Evaluations(EVALUATIONS).studies():
        report.write_study(study, params, EVALUATIONS, REPORTS)
    report.write_numbers(params, EVALUATIONS, Path.cwd())
    index = report.write_index(params, EVALUATIONS, REPORTS)
    mlflow_report.log(params, EVALUATIONS, Path.cwd())
    index.say(params.run.studies)


if __name__ == "__main__":
    run(main)
