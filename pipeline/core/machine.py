"""What a sweep needs of its machine beside data and weights: looked at before anything starts, and by `hificl doctor`.

Ray finds out later: after minutes, in three attempts or never.
"""

from __future__ import annotations

import getpass
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.core import plain_paths
from pipeline.core.errors import InputError

OPEN_FILES = 512  # of one process: Ray's own have some hundred, and wait without end where they get none
_WANTED_FILES = 65_536
_RAY_MIB = 64  # its sockets, logs and the first objects
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def token_file() -> Path:
    """Return where Ray's token is kept.

    Raises:
        InputError: there is no home folder, or it can neither be read nor written.
    """
    way_out = "Set HOME to a folder that can be written, or RAY_AUTH_TOKEN_PATH to a file of mode 600 with a token"
    try:
        file = Path.home() / ".ray/auth_token"
    except RuntimeError:
        raise InputError(
            "no home folder: HOME is not set, and this user is unknown", where="HOME", way_out=way_out
        ) from None
    above = next(folder for folder in (file.parent, *file.parents) if folder.exists())
    if not os.access(file if file.exists() else above, os.R_OK if file.exists() else os.W_OK | os.X_OK):
        raise InputError("cannot be read" if file.exists() else "cannot be written", where=str(file), way_out=way_out)
    return file


def home() -> str:
    """Return where the token is; a user without a name gets one, which MLflow asks for.

    Raises:
        InputError: see `token_file`.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    if any(os.environ.get(name) for name in TOKEN_VARIABLES):
        return "the environment names Ray's token"
    return f"Ray's token in {token_file()}"


def open_files() -> str:
    """Return how many files a process may open; as many as it may allow itself are allowed.

    Raises:
        InputError: too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < _WANTED_FILES and (hard == unlimited or hard > soft):
        soft = _WANTED_FILES if hard == unlimited else min(hard, _WANTED_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != unlimited and soft < OPEN_FILES:
        raise InputError(
            f"a process may open {soft} files, Ray needs {OPEN_FILES}", where="ulimit -n",
            way_out=f"Call `ulimit -n {_WANTED_FILES}` before, or have the limit raised (limits.conf, --ulimit nofile)",
        )  # fmt: skip
    return "unlimited" if soft == unlimited else f"{soft} a process"


def ray_room() -> str:
    """Return Ray's folder and what is free there.

    Raises:
        InputError: there is no folder for Ray, or no room in it.
    """
    folder = plain_paths.ray_folder()
    free = shutil.disk_usage(folder).free / 2**20
    if free < _RAY_MIB:
        raise InputError(
            f"{free:.1f} MiB free, Ray needs {_RAY_MIB}", where=str(folder),
            way_out=f"Free some space, or set {plain_paths.VARIABLE} to another folder",
        )  # fmt: skip
    return f"{folder}, {free / 1024:.1f} GiB free"


CHECKS: dict[str, Callable[[], str]] = {"home": home, "open files": open_files, "Ray's folder": ray_room}


def require() -> None:
    """See that a private cluster can start here.

    Raises:
        InputError: it cannot; the message says why and the way out.
    """
    for check in CHECKS.values():
        check()
