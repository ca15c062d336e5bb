"""DVC stage: train every trial of the profile's studies that is not in the trial store yet."""

from __future__ import annotations

from pipeline.config import Params
from pipeline.sweep.run import sweep
from stages.common import run


def main(params: Params) -> None:
    sweep(params, params.run.studies)


if __name__ == "__main__":
    run(main)
