"""The MLflow UI over a folder's store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.errors import InputError
from pipeline.progress import say

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(folder: Path, *, host: str, port: int) -> None:
    """Serve the MLflow UI until it is interrupted.

    Raises:
        InputError: there is no store yet.
    """
    store = folder / "mlflow.db"
    if not store.exists():
        raise InputError("no MLflow store", where=str(store), way_out="Run `make repro` or `hificl sweep` first")
    if host not in LOOPBACK:
        say(f"warning: {host} can be reached from other machines, and this server asks nobody for a password")
    say(f"MLflow on http://{host}:{port} (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{store}", "--artifacts-destination", str(folder / "mlartifacts")]
    subprocess.run([*command, *stores], check=False)
