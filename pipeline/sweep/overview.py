"""Every study of params.yaml: its table or figure, and how far its trials are."""

from __future__ import annotations

from typing import Any

from pipeline.config import Params
from pipeline.errors import HificlError
from pipeline.sweep.plan import make_plan
from pipeline.sweep.run import all_cells, places
from pipeline.sweep.store import TrialStore


def overview(params: Params) -> dict[str, Any]:
    """Return title, paper's table and the number of trials done and open by study, under the current profile."""
    where = places()
    store = TrialStore(where.runs)
    found: dict[str, Any] = {}
    for name, study in params.studies.items():
        row: dict[str, Any] = {"title": study.title, "paper": study.paper, "in_profile": name in params.run.studies}
        try:
            plan = make_plan(params, all_cells(params, [name], where), where)
            done = sum(store.finished(key) for key in plan.trials)
            row.update(trials=len(plan.trials), done=done, open=len(plan.trials) - done)
        except HificlError as error:
            row["not_ready"] = str(error)
        found[name] = row
    return found
