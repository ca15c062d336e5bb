"""MLflow's page as `hificl ui` serves it: it opens on model training instead of GenAI, and nothing lies over it.

The page keeps both settings in the browser, at its first visit as the page's makers want them. An `mlflow.app` plugin
(`mlflow server --app-name hificl`), so that MLflow's own server is what runs.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from fastapi import FastAPI
from flask import Response

NAME = "hificl"  # as pyproject.toml has it
# set where the browser has no value yet: what somebody chooses in the page stays
_FIRST = {"mlflow.workflowType_v1": '"machine_learning"', "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true"}
_OPEN = "location.hash||(location.hash='#/experiments');"
_SCRIPT = _OPEN + "".join(
    f"localStorage.getItem('{key}')||localStorage.setItem('{key}','{value}');" for key, value in _FIRST.items()
)


def create_app() -> FastAPI:
    """Return MLflow's application with the two settings in its page."""
    from mlflow.server import app as pages  # read at import: the store's address is in the environment by then
    from mlflow.server.fastapi_app import app

    index = Path(str(pages.static_folder)) / "index.html"
    if index.is_file():
        text = index.read_text(encoding="utf-8").replace("<head>", f"<head><script>{_SCRIPT}</script>", 1)
        pages.view_functions["serve"] = lambda: Response(text, headers={"Cache-Control": "no-store"})
    return app


def options() -> list[str]:
    """Return what makes `mlflow server` run it; nothing where this package was installed before it had the plugin."""
    return ["--app-name", NAME] if any(one.name == NAME for one in entry_points(group="mlflow.app")) else []
