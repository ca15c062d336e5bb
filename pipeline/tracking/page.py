"""What MLflow's page shows: how it opens (an `mlflow.app` plugin), an experiment's kind and table, what is written.

MLflow's page opens an experiment by its kind, or, in newer versions, by a switch that each browser keeps, set at its
first visit as the page's makers want it. `hificl ui` sets it (`mlflow server --app-name hificl`): what runs is MLflow's
own server. A view that is saved in an experiment's tag has an address.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.trial import digest

if TYPE_CHECKING:
    from fastapi import FastAPI

APP = "hificl"  # the plugin's name, as pyproject.toml has it
TABLE = "table"  # the saved view's name in an address
REPORT = "report"  # the artifact folder of a sweep's report
NOTE = "mlflow.note.content"
_WRITTEN = "mlflow.note.digest"  # of the note that was written here: one that a reader has changed is left alone
_KIND, _VIEW = "mlflow.experimentKind", f"mlflow.sharedViewState.{TABLE}"
_GUESSED = ("", "no_inferred_type")  # and all that end with "_inferred": the page's own guesses
_NAME = "attributes.`Run Name`"
_COLUMNS = ("metrics.`table_value`", "tags.`table.row`", "tags.`table.column`", "attributes.`Models`")
_STATE = {
    "searchFilter": "tags.`table.row` != ''", "orderByKey": "tags.`table.row`", "orderByAsc": True, "startTime": "ALL",
    "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
    "selectedColumns": list(_COLUMNS), "columnOrder": [_NAME], "columnWidths": {_NAME: 280},
}  # fmt: skip
# set where the browser has no value yet: what somebody chooses in the page stays
_FIRST = {"mlflow.workflowType_v1": '"machine_learning"', "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true"}
_OPEN = "location.hash||(location.hash='#/experiments');"
_SCRIPT = _OPEN + "".join(
    f"localStorage.getItem('{key}')||localStorage.setItem('{key}','{value}');" for key, value in _FIRST.items()
)
# the page unfolds a sweep's run for children of this type
SCORED = {"mlflow.runType": "evaluation"}


def experiment_tags(known: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that an experiment lacks to open on its runs, with the study's table as a saved view."""
    wanted = {_VIEW: json.dumps(_STATE)}
    kind = known.get(_KIND, "")
    if kind in _GUESSED or kind.endswith("_inferred"):
        wanted[_KIND] = "custom_model_development"
    return {key: value for key, value in wanted.items() if known.get(key) != value}


def note_tags(known: Mapping[str, str], text: str, *, ours: bool = False) -> dict[str, str]:
    """Return the tags that set a description; none where it says that already, or a reader has changed it.

    Args:
        known: the tags of the experiment or run.
        text: Markdown.
        ours: whether a description of before digests were kept was written here.
    """
    before, written = known.get(NOTE), known.get(_WRITTEN)
    if before is not None and (digest(before) != written if written else not ours):
        return {}
    wanted = {NOTE: text, _WRITTEN: digest(text)}
    return {} if all(known.get(key) == value for key, value in wanted.items()) else wanted


def table_link(experiment: str) -> str:
    """Return the address of an experiment's runs as the study's table, within MLflow's page."""
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={TABLE}"


def report_link(experiment: str, sweep: str, study: str) -> str:
    """Return the address of a study's report with its sweep's run, within MLflow's page."""
    return f"#/experiments/{experiment}/runs/{sweep}/artifacts/{REPORT}/{study}.html"


def trial_text(experiment: str, sweep: str, study: str, run_id: str, text: str) -> str:
    """Return what a trial's run says: `text`, and what leads on from it."""
    link = f"[The study's tables and figures]({report_link(experiment, sweep, study)})"
    return f"{text}\n\n{link}. `hificl reproduce {run_id}` runs it again."


def create_app() -> FastAPI:
    """Return MLflow's application with the two settings in its page."""
    from flask import Response
    from mlflow.server import app as pages  # read at import: the store's address is in the environment by then
    from mlflow.server.fastapi_app import app

    index = Path(str(pages.static_folder)) / "index.html"
    if index.is_file():
        text = index.read_text(encoding="utf-8").replace("<head>", f"<head><script>{_SCRIPT}</script>", 1)
        pages.view_functions["serve"] = lambda: Response(text, headers={"Cache-Control": "no-store"})
    return app


def server_options() -> list[str]:
    """Return what makes `mlflow server` run it; nothing where this package was installed before it had the plugin."""
    return ["--app-name", APP] if any(entry.name == APP for entry in entry_points(group="mlflow.app")) else []
