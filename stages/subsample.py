"""DVC stage: draw the samples of every task that the profile's studies need, or of those named."""

from __future__ import annotations

import sys

from pipeline.config.load import Params
from pipeline.plan.space import needed
from pipeline.sweep.draw import draw_task
from stages.common import run


def main(params: Params) -> None:
    for task in sys.argv[1:] or needed(params, params.run.studies)[1]:
        draw_task(params, task)


if __name__ == "__main__":
    run(main)
