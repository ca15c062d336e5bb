"""A cluster: to start a private one or join another, whether every node of it runs this code, and the sweep as a Ray
job that lives on its head.

A sweep over two versions is a sweep of nothing. Whoever started the job may go, and anybody with the token can follow
it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import PACKAGE
from pipeline.config.schema import Sweep
from pipeline.core import machine
from pipeline.core.errors import HificlError, InputError, WorkError
from pipeline.core.progress import say
from pipeline.pool import ensure_token
from pipeline.pool.processes import kept_handlers

SECONDS = 120.0  # for all nodes' answers; a fresh worker process takes a few
PACKAGES = ("torch", "transformers", "deepspeed", "ray")
Version = dict[str, str]
_WAY_OUT = "Bring the node to the same version (`ray up` runs its setup commands again), then start the sweep again"


def _reader(packages: tuple[str, ...], this: str = PACKAGE) -> Callable[[], Version]:
    """Return a function that reads a node's version; nested, so that it is shipped and not imported there."""

    def read() -> Version:
        import hashlib
        import importlib.util
        import platform
        import sys
        from importlib import metadata
        from pathlib import Path

        def version(name: str) -> str:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                return "not installed"

        package = importlib.util.find_spec(this)
        content = hashlib.sha256()
        if package is not None and package.origin is not None:
            root = Path(package.origin).parent
            files = sorted(file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
            for file in files:
                content.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
        code = content.hexdigest()[:12] if package is not None else "not installed"
        versions = {name: version(name) for name in packages}
        return {"code": code, "python": platform.python_version(), "executable": sys.executable, **versions}

    return read


def code_version() -> Version:
    """Return this process's `code` (digest of the package `pipeline`), `python` and package versions."""
    read = _reader(PACKAGES)()
    return {part: value for part, value in read.items() if part != "executable"}


def require(expected: Version) -> None:
    """Refuse to work where the code is not the sweep's; for nodes that join later.

    Raises:
        InputError: names this node, and what differs.
    """
    _compare(ray.util.get_node_ip_address(), code_version(), expected)


def work_in(home: str) -> None:
    """Make the project's folder this process's: a worker starts in the folder in which its node's Ray was started.

    Raises:
        InputError: the folder is not on this node.
    """
    try:
        os.chdir(home)
    except OSError as error:
        raise InputError(
            f"the project's folder {home} is not there ({error.strerror})",
            where=f"node {ray.util.get_node_ip_address()}",
            way_out="Keep it on a path that all nodes share",
        ) from None


def _nodes() -> dict[str, str]:
    """Return the address of every node that lives, by Ray's name of it."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def check_nodes() -> None:
    """Ask every node of the cluster for its version.

    One that dies meanwhile is none; one that joins later is asked by its slot (`require`).

    Raises:
        InputError: a node has another version, or does not answer; nothing was started.
        WorkError: Ray lost a node's answer; it can be asked again.
    """
    expected = code_version()
    nodes = _nodes()
    read = ray.remote(num_cpus=0, max_retries=0)(_reader(PACKAGES))
    asked = {
        read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False)).remote(): key for key in nodes
    }
    ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS)
    if waiting:
        raise InputError(
            f"gave no answer within {SECONDS:.0f} s", where=f"node {nodes[asked[waiting[0]]]}",
            way_out="Look at its log with `ray logs`",
        )  # fmt: skip
    for answer in ready:
        name = nodes[asked[answer]]
        try:
            version = ray.get(answer)
        except ray.exceptions.RayError as error:
            if asked[answer] in _nodes():
                raise unanswered(name, error) from None
            continue
        _compare(name, version, expected)
        machine.require_plain(version["executable"], f"node {name}")


def unanswered(name: str, error: ray.exceptions.RayError) -> HificlError:
    """Explain why a node could not say which code it has: the code that it has, or Ray, which may know soon."""
    of_node = isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.RuntimeEnvSetupError)
    text = f"could not say which code it has ({str(error).strip().splitlines()[-1]})"
    return (InputError if of_node else WorkError)(text, where=f"node {name}", way_out=_WAY_OUT if of_node else None)


def _compare(name: str, version: Version, expected: Version) -> None:
    for part, wanted in expected.items():
        if version.get(part) != wanted:
            raise InputError(
                f"has {part} {version.get(part)}, the sweep was started from {part} {wanted}",
                where=f"node {name}",
                way_out=_WAY_OUT,
            )


@contextmanager
def running(sweep: Sweep) -> Iterator[None]:
    """Connect to the cluster that `sweep.address` names, or start a private one for the time of the block.

    Raises:
        InputError: no cluster answers at the address, or a node of it runs other code; there is no place for a private
            one, or its processes cannot be started below this path.
    """
    if ray.is_initialized():
        yield
        return
    ensure_token()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if sweep.address is None:
        for path in (sys.executable, ray.__file__):
            machine.require_plain(path, "this environment")
        # also where another one runs; without a dashboard
        options.update(address="local", include_dashboard=False, _temp_dir=str(machine.ray_folder() / "ray"))
    else:
        options.update(address=sweep.address)
    with nullcontext() if sweep.address else _on_loopback():
        try:
            with kept_handlers():  # Ray sets handlers of its own, which print a stack trace and abort
                ray.init(**options)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise InputError(
                f"no Ray cluster answers at '{sweep.address}' ({error})",
                where="sweep.address",
                way_out="Start one with `ray up cluster/cluster.yaml`, or set sweep.address to null",
            ) from None
        try:
            if sweep.address is not None:
                check_nodes()
            yield
        finally:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray bind to 127.0.0.1 inside the block, as it does by default on macOS and Windows.

    `_node_ip_address="127.0.0.1"` does not: Ray takes the machine's outer address in its place and listens everywhere.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # the first for the processes that Ray starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[0]


async def draining() -> set[str]:
    """Return Ray's names of the nodes that are to be taken away (`ray drain-node`, or Ray's autoscaler).

    Ray offers no public call for it; this is the one that Ray Train makes for the same purpose. No answer is none.
    """
    try:
        return set(await asyncio.to_thread(ray._private.state.state.get_draining_nodes))
    except Exception:  # a head that does not answer is seen by who watches it
        return set()


def drain(seconds: float, node: str | None = None) -> None:
    """Let Ray put nothing more on this node, and let its slots keep their last step and leave it.

    Args:
        seconds: until it is taken away.
        node: Ray's name of it; None: this machine's.

    Raises:
        WorkError: there is no Ray here, or it refuses.
    """
    words = ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "interruption notice",
             "--deadline-remaining-seconds", str(int(seconds)), *(["--node-id", node] if node else [])]  # fmt: skip
    ray_program = str(Path(sys.executable).with_name("ray"))
    try:
        done = subprocess.run([ray_program, *words], capture_output=True, text=True, check=False, timeout=SECONDS)
        why = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]) if done.returncode else None
    except subprocess.TimeoutExpired:
        why = "no answer"
    if why is not None:
        raise WorkError(f"Ray did not drain this node: {why}", way_out="Is Ray started here? `ray status`")


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
    words = ["env", f"MLFLOW_TRACKING_URI={tracking}", sys.executable, "-m", PACKAGE, "sweep",
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
