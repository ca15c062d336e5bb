"""Paths that every program takes: Ray's own folder, and a link to an environment whose path some program does not take.

Ray starts a worker as one line of a shell and quotes nothing in it, MLflow writes the place of its migrations where `%`
has a meaning, and a socket's path has at most 107 bytes. So an environment whose path holds more than plain letters is
called through a link, and Ray's folder lies in the first temporary folder that fits.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.core.files import disk_error

VARIABLE = "RAY_TMPDIR"
SYSTEM = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - Ray's own default is the first
_PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")
_LETTERS = "letters, digits and _./+-"
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_SOCKET = "/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
MOST = _SOCKET_BYTES - len(_SOCKET)  # bytes of a folder that holds Ray's


def go_on_plainly() -> None:
    """Call this program again through a link, where its environment's path is not plain; else do nothing.

    Raises:
        InputError: there is no place for the link, or the current folder's name is no text.
    """
    here = os.fsencode(Path.cwd())
    try:
        here.decode()
    except UnicodeDecodeError:
        raise InputError(
            "the folder's path is no text in UTF-8, which DVC and MLflow keep paths in",
            where=here.decode("ascii", "backslashreplace"),
            way_out="Rename the folder",
        ) from None
    program = python()
    if program != sys.executable:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(program, [program, *sys.orig_argv[1:]])  # noqa: S606 - the same Python by another name


def python() -> str:
    """Return the path to call this Python by: its own, or through a link where that is not plain.

    Raises:
        InputError: there is no place for the link.
    """
    if is_plain(sys.executable) and is_plain(sys.prefix):
        return sys.executable
    link = _own_folder() / hashlib.sha256(os.fsencode(sys.prefix)).hexdigest()[:12]
    try:
        if not link.is_symlink() or link.readlink() != Path(sys.prefix):
            draft = link.with_name(f"{link.name}.{os.getpid()}")
            draft.symlink_to(sys.prefix, target_is_directory=True)
            draft.replace(link)
    except OSError as error:
        raise disk_error(error, link) from error
    name = Path(sys.executable).name
    return str(link / "bin" / (name if (link / "bin" / name).exists() else "python3"))


def ray_folder() -> Path:
    """Return the folder that Ray's own is made in: RAY_TMPDIR, else the first that fits of TMPDIR and the system's.

    Raises:
        InputError: RAY_TMPDIR does not fit, or nothing else does.
    """
    named = os.environ.get(VARIABLE)
    given = os.environ.get("TMPDIR") or SYSTEM[0]
    whys = {}
    for path in [named] if named else dict.fromkeys([given, *SYSTEM]):
        why = _unfit(path)
        if why is None:
            return Path(path)
        whys[path] = why
    raise InputError(
        f"no folder for Ray: {'; '.join(f'{path} {why}' for path, why in whys.items())}",
        where=VARIABLE if named else "TMPDIR",
        way_out=f"Set {VARIABLE} to a folder that can be written, of at most {MOST} {_LETTERS}",
    )


def require_plain(path: str, where: str) -> None:
    """Refuse a path that Ray cannot start a worker from.

    Raises:
        InputError: it is one.
    """
    if not is_plain(path):
        raise InputError(
            f"Ray starts no worker from {path}: the path has other characters than {_LETTERS}",
            where=where,
            way_out="Call the environment through a link whose path has none",
        )


def is_plain(path: str) -> bool:
    """Whether a path is one word, and nothing but a path, to every program."""
    return _PLAIN.fullmatch(path) is not None


def _unfit(path: str) -> str | None:
    """Return why Ray's folder cannot be made in `path`, None where it can."""
    length = len(os.fsencode(path))
    if length > MOST:
        return f"is too long for Ray's sockets ({length} bytes, at most {MOST})"
    if not path.startswith("/") or not is_plain(path):
        return f"is no absolute path of {_LETTERS}"
    return None if os.access(path, os.W_OK | os.X_OK) else "cannot be written"


def _own_folder() -> Path:
    """Return a folder that nobody else can put a link into."""
    user_folder = ray_folder() / f"hificl-{os.getuid()}"
    try:
        user_folder.mkdir(mode=0o700, exist_ok=True)
        state = user_folder.lstat()
    except OSError as error:
        raise disk_error(error, user_folder) from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise InputError(
            "is not a folder of yours alone", where=str(user_folder), way_out=f"Remove it, or set {VARIABLE}"
        )
    return user_folder
