"""DVC stage: train every trial of the profile's studies that is not in the trial store yet."""

from __future__ import annotations

from pipeline.config.load import Params
from pipeline.sweep.train import sweep
from stages.common import run


def main(params: Params) -> None:
    sweep(params, params.run.studies)


if __name__ == "__main__":
    run(main)
