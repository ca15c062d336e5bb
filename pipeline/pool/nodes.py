"""Whether every node of a cluster runs this code: a sweep over two versions is a sweep of nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.core import machine
from pipeline.core.errors import InputError

SECONDS = 120.0  # for all nodes' answers; a fresh worker process takes a few
PACKAGES = ("torch", "transformers", "deepspeed", "ray")
Version = dict[str, str]
_WAY_OUT = "Bring the node to the same version (`ray up` runs its setup commands again), then start the sweep again"


def _reader(packages: tuple[str, ...]) -> Callable[[], Version]:
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

        package = importlib.util.find_spec("pipeline")
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


def check_nodes() -> int:
    """Ask every node of the cluster for its version; return how many nodes there are.

    Raises:
        InputError: a node has another version, or does not answer; nothing was started.
    """
    expected = code_version()
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    read = ray.remote(num_cpus=0, max_retries=0)(_reader(PACKAGES))
    asked = {
        read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False)).remote(): key for key in nodes
    }
    ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS)
    if waiting:
        name = nodes[asked[waiting[0]]]["NodeManagerAddress"]
        raise InputError(
            f"gave no answer within {SECONDS:.0f} s", where=f"node {name}", way_out="Look at its log with `ray logs`"
        )
    for answer in ready:
        name = nodes[asked[answer]]["NodeManagerAddress"]
        version = _answer(name, answer)
        _compare(name, version, expected)
        machine.require_plain(version["executable"], f"node {name}")
    return len(nodes)


def _answer(name: str, answer: Any) -> Version:
    try:
        return ray.get(answer)
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise InputError(f"could not say which code it has ({cause})", where=f"node {name}", way_out=_WAY_OUT) from None


def _compare(name: str, version: Version, expected: Version) -> None:
    for part, wanted in expected.items():
        if version.get(part) != wanted:
            raise InputError(
                f"has {part} {version.get(part)}, the sweep was started from {part} {wanted}",
                where=f"node {name}",
                way_out=_WAY_OUT,
            )
