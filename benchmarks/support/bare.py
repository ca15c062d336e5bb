"""The training loops of a workspace's sweep by themselves, one after another in this process: `overhead`'s yardstick.

Run in the workspace: no Ray, no MLflow, no DVC; the backbone is loaded once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pipeline.config.load import load
from pipeline.plan.plan import all_cells, make_plan, places
from pipeline.train.workbench import Workbench, use_threads


def main(out: Path) -> None:
    """Train every trial of the workspace's studies into `out`."""
    use_threads()
    params = load()
    where = places(None)
    plan = make_plan(params, all_cells(params, list(params.run.studies), where), where)
    bench = Workbench()
    for config in plan.trials.values():
        bench.admit(replace(plan.request_of(config), folder=str(out / config.key)))
        while bench.advance():
            pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
