"""The sweep as a Ray job: it lives on the head, whoever started it may go, and anybody with the token can follow it."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.errors import InputError, WorkError
from pipeline.core.progress import say
from pipeline.pool import ensure_token

DASHBOARD = "http://127.0.0.1:8265"
MLFLOW = "http://127.0.0.1:5000"
FAILED, INTERRUPTED = 1, 130


def submit(arguments: list[str]) -> int:
    """Start `hificl sweep ARGUMENTS` on the cluster of this node as a Ray job, follow it, return its exit status.

    A sweep of the same folder that runs already is followed if it is the same, and else named in the error.

    Raises:
        InputError: no cluster here, an address with a password in it, or another sweep runs.
    """
    client = _client()
    here = str(Path.cwd())
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or MLFLOW
    refuse_password(tracking)
    running = next((job for job in _sweeps(client) if not _ended(job)), None)
    if running is None:
        name = client.submit_job(
            entrypoint=entrypoint(here, arguments, tracking),
            metadata={"hificl": here, "arguments": json.dumps(arguments)},
        )
        say(f"the sweep is Ray job {name}; it goes on when this connection ends (`hificl sweep --attach` follows it)")
        return _follow(client, name)
    if json.loads(running.metadata.get("arguments", "[]")) != arguments:
        name = running.submission_id
        raise InputError(
            f"a sweep with other arguments runs here: {running.metadata.get('arguments')}",
            where=f"Ray job {name}",
            way_out=f"Follow it with `hificl sweep --attach`, or end it with `ray job stop {name}`",
        )
    say(f"this sweep runs already, as Ray job {running.submission_id}")
    return _follow(client, running.submission_id)


def entrypoint(home: str, arguments: list[str], tracking: str) -> str:
    """Return the job's command. Ray gives it to a shell, so every word is quoted."""
    words = ["env", f"MLFLOW_TRACKING_URI={tracking}", sys.executable, "-m", "pipeline", "sweep",
             "--set", "sweep.address=auto", *arguments]  # fmt: skip
    return f"cd {shlex.quote(home)} && exec {shlex.join(words)}"


def attach_to_sweep() -> int:
    """Follow the sweep of this folder that runs on the cluster, or show how the last one ended; return its exit status.

    Ctrl-C ends the following, not the sweep.

    Raises:
        InputError: no cluster here, or no sweep was submitted to it from this folder.
    """
    client = _client()
    jobs = _sweeps(client)
    if not jobs:
        way_out = "Start one with `ray submit cluster.yaml sweep`, or `hificl sweep --submit` on the head"
        raise InputError("no sweep was submitted from this folder", where=str(Path.cwd()), way_out=way_out)
    job = next((running for running in jobs if not _ended(running)), jobs[0])
    return _follow(client, job.submission_id)


def _client() -> Any:
    ensure_token()
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    from ray.job_submission import JobSubmissionClient  # after the token: Ray reads its mode when it is imported

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers ({str(error).splitlines()[0]})",
            where=address,
            way_out="Run this on the head: `ray submit cluster.yaml sweep`, or "
            "`ray exec cluster.yaml 'cd ~/hificl-lab && hificl sweep --attach'`",
        ) from None


def _sweeps(client: Any) -> list[Any]:
    """Return the jobs that are sweeps of this folder, the newest first."""
    here = str(Path.cwd())
    of_folder = [job for job in client.list_jobs() if (job.metadata or {}).get("hificl") == here]
    return sorted(of_folder, key=lambda job: job.start_time or 0, reverse=True)


def _ended(job: Any) -> bool:
    return bool(job.status.is_terminal())


def _follow(client: Any, name: str) -> int:
    """Pass the job's log on to standard error until it ends."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(name):
            sys.stderr.write(lines)
            sys.stderr.flush()

    try:
        asyncio.run(tail())
        job = client.get_job_info(name)
    except KeyboardInterrupt:
        say(
            f"no longer followed; Ray job {name} goes on. "
            f"`hificl sweep --attach` follows it again, `ray job stop {name}` ends it"
        )
        return INTERRUPTED
    except (RuntimeError, ConnectionError) as error:
        raise WorkError(
            f"the connection to the cluster ended ({str(error).splitlines()[0]})",
            where=f"Ray job {name}",
            way_out="`hificl sweep --attach` follows it again",
        ) from None
    say(f"Ray job {name}: {job.status.value.lower()}")
    if job.status.value == "SUCCEEDED":
        return 0
    return job.driver_exit_code or FAILED


def refuse_password(uri: str) -> None:
    """Refuse an address of a store that holds a password.

    Raises:
        InputError: it does; the message does not repeat it.
    """
    if urlsplit(uri).password:
        raise InputError(
            "an address with a password would stand in the job's command and in logs",
            where="MLFLOW_TRACKING_URI",
            way_out="Leave it out; MLflow reads ~/.mlflow/credentials, PostgreSQL ~/.pgpass (both mode 600)",
        )
