"""DVC stage: score the chosen trials of the profile's studies on the evaluation split."""

from __future__ import annotations

from pipeline.config.load import Params
from pipeline.sweep.evaluate import evaluate
from stages.common import run


def main(params: Params) -> None:
    evaluate(params, params.run.studies)


if __name__ == "__main__":
    run(main)
