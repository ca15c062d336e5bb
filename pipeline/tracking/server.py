"""MLflow's servers: its page over a folder's store (`serve_page`), and one that asks for a password (`start`).

The head of a cluster runs the second:

    FOLDER/password      the administrator's password, made at the first start
    FOLDER/session-key   what the server signs its forms with
    FOLDER/auth.ini      who may do what; users in FOLDER/auth.db
    FOLDER/artifacts     what runs keep as files
    FOLDER/server.log

Every file with a secret is for its owner alone (mode 600). Secrets reach the server through files and its
environment, never through arguments, which every user of the machine can read.
"""

from __future__ import annotations

import base64
import configparser
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.core.copies import main_checkout
from pipeline.core.errors import InputError, WorkError
from pipeline.core.files import secret
from pipeline.core.progress import say
from pipeline.tracking import page, store
from pipeline.tracking.client import Tracker

LOOPBACK = ("127.0.0.1", "localhost", "::1")

USER = "admin"
START_SECONDS, ANSWER_SECONDS = 300.0, 30.0  # a busy machine imports MLflow for a minute


def serve_page(folder: Path, uri: str | None, *, host: str, port: int) -> None:
    """Serve the MLflow UI of the store at `uri` (None: the environment's, else the project's) until it is interrupted.

    Raises:
        InputError: there is no store yet, or it is a server, which has a page of its own.
    """
    address = store.resolve_address(uri or os.environ.get("MLFLOW_TRACKING_URI") or None, main_checkout(folder))
    store.require_there(address)
    if not store.is_database(address):
        raise InputError(
            "the store is a server with its own page", where=store.shown(address), way_out="Open it in a browser"
        )
    if host not in LOOPBACK:
        say(f"warning: {host} can be reached from other machines, and this server asks nobody for a password")
    Tracker(address, folder).bring_up()
    if not page.server_options():
        say("note: the page opens on GenAI; choose Model training there, or run `make setup` again")
    say(f"MLflow on http://{host}:{port} (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += page.server_options()
    files = ["--artifacts-destination", (main_checkout(folder) / "mlartifacts").as_uri()]
    # in the environment, not among the arguments: the address may hold a password. Jobs are processes of their own that
    # nothing here asks for.
    environment = {"MLFLOW_BACKEND_STORE_URI": address, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    subprocess.run([*command, *files], check=False, env={**os.environ, **environment})


def start(folder: Path, *, host: str, port: int, database: str | None, artifacts: str | None, detach: bool) -> None:
    """Start the server; with `detach`, return when it answers. One that answers already is left alone.

    Args:
        folder: where it keeps its things.
        host: address to listen at.
        port: to listen at.
        database: of the runs, without a password (PostgreSQL reads it from ~/.pgpass); None: SQLite in `folder`.
        artifacts: where files go (a folder or s3://...); None: `folder`/artifacts.
        detach: leave it running.

    Raises:
        InputError: an address of all interfaces, a password in the database's address, or a database that is away.
        WorkError: it does not come up.
    """
    address = f"http://{host}:{port}"
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - refused here
        way_out = "Give 127.0.0.1 and look through an ssh tunnel, or the cluster's own address"
        raise InputError("the server would listen on every interface of the machine", where="--host", way_out=way_out)
    folder = folder.expanduser().resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = database or os.environ.get("MLFLOW_BACKEND_STORE_URI") or store.sqlite_uri(folder / "mlflow.db")
    if urlsplit(database).password:
        raise InputError(
            "has a password in it, which every process of the server would pass on",
            where="--database",
            way_out="Leave it out and put HOST:PORT:DATABASE:USER:PASSWORD into ~/.pgpass (mode 600)",
        )
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or secret(folder / "password", 24)
    _credentials(password)
    if _answers(address, password):
        say(f"MLflow answers at {address} already")
        return
    store.probe(database)
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(_auth_config(folder)),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret(folder / "session-key", 32),
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts or (folder / "artifacts").as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # four more processes, for features that nobody uses here
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", host]
    command += ["--port", str(port), "--workers", "1"]
    say(f"MLflow on {address}, user {USER}, password in {folder / 'password'}")
    if not detach:
        subprocess.run(command, env=environment, cwd=folder, check=False)
        return
    with open(os.open(folder / "server.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), "a") as log:
        server = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while not _answers(address, password):
        if server.poll() is not None or time.monotonic() > deadline:
            server.terminate()
            raise WorkError("the MLflow server did not come up", where=str(folder / "server.log"))
        time.sleep(0.3)


def _credentials(password: str) -> None:
    """Let MLflow's clients of this user log in, where they have no credentials yet."""
    path = Path("~/.mlflow/credentials").expanduser()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(f"[mlflow]\nmlflow_tracking_username = {USER}\nmlflow_tracking_password = {password}\n")


def _auth_config(folder: Path) -> Path:
    config = configparser.ConfigParser()
    config["mlflow"] = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": store.sqlite_uri(folder / "auth.db").replace("%", "%%"),  # which would begin a reference
        "admin_username": USER,
        "auth_cache_ttl_seconds": "60",  # a password's hash takes longer than the call it opens
    }
    path = folder / "auth.ini"
    with open(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
        config.write(file)
    return path


def _answers(address: str, password: str) -> bool:
    """Whether a server there lets the administrator in.

    Raises:
        InputError: somebody else answers at the address, or the password is another one.
    """
    secret = base64.b64encode(f"{USER}:{password}".encode()).decode()
    request = urllib.request.Request(  # noqa: S310 - the scheme is written above
        f"{address}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Authorization": f"Basic {secret}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return False  # it is about to come up, or another start tells why it does not
        way_out = "Give another --port, or the password that it was started with (MLFLOW_TRACKING_PASSWORD)"
        raise InputError(
            f"somebody answers who does not let us in ({error.code})", where=address, way_out=way_out
        ) from None
    except OSError:
        return False
