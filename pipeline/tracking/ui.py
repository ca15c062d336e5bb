"""The MLflow UI over a folder's store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.copies import main_checkout
from pipeline.errors import InputError
from pipeline.progress import say
from pipeline.tracking import page, store
from pipeline.tracking.runs import Tracker

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(folder: Path, uri: str | None, *, host: str, port: int) -> None:
    """Serve the MLflow UI until it is interrupted.

    Args:
        folder: the project's.
        uri: the store's address; None: MLFLOW_TRACKING_URI, else mlflow.db in `folder`.
        host: where it listens.
        port: likewise.

    Raises:
        InputError: there is no store yet, or it is a server, which has a page of its own.
    """
    address = store.resolve(uri or os.environ.get("MLFLOW_TRACKING_URI") or None, main_checkout(folder))
    file = store.sqlite_file(address)
    if file is not None and not file.exists():
        raise InputError("no MLflow store", where=str(file), way_out="Run `make repro` or `hificl sweep` first")
    if not store.is_database(address):
        raise InputError("the store is a server with its own page", where=address, way_out="Open it in a browser")
    if host not in LOOPBACK:
        say(f"warning: {host} can be reached from other machines, and this server asks nobody for a password")
    Tracker(address, folder).bring_up()
    if not page.options():
        say("note: the page opens on GenAI; choose Model training there, or run `make setup` again")
    say(f"MLflow on http://{host}:{port} (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += page.options()
    files = ["--artifacts-destination", (main_checkout(folder) / "mlartifacts").as_uri()]
    # in the environment, not among the arguments: the address may hold a password. Jobs are processes of their own that
    # nothing here asks for.
    own = {"MLFLOW_BACKEND_STORE_URI": address, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    subprocess.run([*command, *files], check=False, env={**os.environ, **own})
