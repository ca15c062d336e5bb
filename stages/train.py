"""DVC stage: train every trial of the profile's studies that is not in the trial store yet."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import Params
from pipeline.core import copies
from pipeline.pool.supervisor import Drivers
from stages.common import run


def main(params: Params) -> None:
    alone = not copies.is_copy(Path.cwd())  # else it may wait for hours until the store is free
    with Drivers(params.sweep if alone else None) as drivers:  # Ray starts while torch and MLflow are imported
        from pipeline.sweep.train import sweep

        sweep(params, params.run.studies, drivers)


if __name__ == "__main__":
    run(main)
