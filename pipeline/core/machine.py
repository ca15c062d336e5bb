"""What a sweep needs of its machine beside data and weights: room, files, a token, paths that every program takes.

Looked at before anything starts, and by `hificl doctor`: Ray finds out after minutes, in three attempts or never. And
how long the machine stays, where it is a spot instance. And the sockets on which `hificl` itself is asked.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import resource
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.errors import InputError, WorkError
from pipeline.core.files import disk_error

OPEN_FILES = 512  # of one process: Ray's own have some hundred, and wait without end where they get none
_WANTED_FILES = 65_536
_RAY_MIB = 64  # its sockets, logs and the first objects
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def free_memory() -> int:
    """Return the bytes of memory that this machine can still give; where Linux does not tell, half of what it has."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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
    folder = ray_folder()
    free = shutil.disk_usage(folder).free / 2**20
    if free < _RAY_MIB:
        raise InputError(
            f"{free:.1f} MiB free, Ray needs {_RAY_MIB}", where=str(folder),
            way_out=f"Free some space, or set {VARIABLE} to another folder",
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


_NOTICE = "/latest/meta-data/spot/instance-action"  # of EC2: 404 until the instance is to be taken away
_TOKEN_SECONDS, _ANSWER_SECONDS = 21_600, 5.0  # of EC2's metadata service, version 2
_METADATA = "http://169.254.169.254"  # where every EC2 instance has it


def notice() -> float | None:
    """Return the seconds left to this spot instance, as EC2's metadata service announces its end; None: no end yet.

    AWS_EC2_METADATA_SERVICE_ENDPOINT names another address, as it does for Amazon's own programs.

    Raises:
        WorkError: no such service answers here.
    """
    import requests

    place = (os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _METADATA).rstrip("/")
    with requests.Session() as session:
        session.trust_env = False  # the service is on this machine's link: no proxy has it
        try:
            life = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
            token = session.put(f"{place}/latest/api/token", headers=life, timeout=_ANSWER_SECONDS)
            token.raise_for_status()
            known = {"X-aws-ec2-metadata-token": token.text}
            answer = session.get(place + _NOTICE, headers=known, timeout=_ANSWER_SECONDS)
            if answer.status_code == requests.codes.not_found:
                return None
            answer.raise_for_status()
            at = datetime.fromisoformat(answer.json()["time"])
            return max(0.0, (at - datetime.now(UTC)).total_seconds())
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            way_out = "Run this on a spot instance of EC2; AWS_EC2_METADATA_SERVICE_ENDPOINT names another address"
            raise WorkError(f"no notice can be read: {error}", where=place, way_out=way_out) from None


def listening(host: str, port: int) -> socket.socket:
    """Return a socket at an address (port 0: a free one); it takes connections when the server is ready.

    Raises:
        InputError: there is no such address, or it is in use.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise InputError(error.strerror or str(error), where=f"{host}:{port}", way_out="Give another --port") from None
    return made


def answer(application: Any, listening: socket.socket, *, grace: int) -> None:
    """Answer with an ASGI application until SIGINT or SIGTERM, and then for `grace` seconds what is under way."""
    import uvicorn

    config = uvicorn.Config(application, log_config=None, access_log=False, timeout_graceful_shutdown=grace)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[listening])  # it raises the signal that ended it once more
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
