"""DVC stage: score the chosen trials of the profile's studies on the evaluation split."""

from __future__ import annotations

from pipeline.config.load import Params
from pipeline.pool.supervisor import ahead
from stages.common import run


def main(params: Params) -> None:
    with ahead(params.sweep) as driver:  # Ray starts while torch and MLflow are imported
        from pipeline.sweep.evaluate import evaluate

        evaluate(params, params.run.studies, driver=driver)


if __name__ == "__main__":
    run(main)
