"""Locks between processes, on every file system: who holds one is told by name, and who was killed holds none.

A lock is `flock`'s where the file system has it for all who see the file. Where it has none, or another host may see
the file and not the lock (NFS mounted with `nolock`), a note beside it decides, which `link` makes for one of several.
It names host and process; its time is renewed every `BEAT_SECONDS`, so that a holder on another host is known to live
or not.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.core.files import disk_error

BEAT_SECONDS = 5.0
_WATCHED = 3 * BEAT_SECONDS  # a note that is not renewed for so long is of a process that is gone
_POLL_SECONDS = 0.5
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """What a note says: what for, and by which process. Process ids are given out again, so its start belongs to it."""

    what: str
    pid: int
    host: str
    boot: str
    started: str
    since: str

    @classmethod
    def here(cls, what: str) -> Holder:
        """Return this process as a holder."""
        pid = os.getpid()
        return cls(what, pid, os.uname().nodename, boot(), started(pid), time.strftime("%F %T"))

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Return who a note names; None where there is none, or nothing of this kind in it."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"{self.what}, pid {self.pid} on {self.host}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == os.uname().nodename

    @property
    def is_gone(self) -> bool:
        """Whether it is a process of this machine that has surely ended."""
        return self.is_here and (self.boot != boot() or started(self.pid) != self.started)


@contextmanager
def held(
    path: Path, what: str, *, wait: float | None = 0.0, waits: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the lock `path` for the time of the block.

    Args:
        path: a file, made if needed; others read in it who holds the lock.
        what: the block is called, for others.
        wait: seconds until it is given up; None: without end.
        waits: called once with the holder, where the lock is not free at once.

    Raises:
        InputError: another process holds it; the message names it.
        WorkError: the file cannot be written.
    """
    deadline = None if wait is None else time.monotonic() + wait
    me, said = Holder.here(what), False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            holder, soft = _take(path, handle, me)
        except BaseException:
            beside = path.with_name(f"{path.name}.held")
            if Holder.read(beside) == me:
                beside.unlink(missing_ok=True)
            os.close(handle)  # or this process would be the one that it waits for next
            raise
        if holder is None:
            break
        os.close(handle)
        if deadline is not None and time.monotonic() >= deadline:
            raise InputError(
                f"held by {holder}", where=str(path.parent if path.name == ".lock" else path),
                way_out="Wait for it to end, or stop it, and run again",
            )  # fmt: skip
        if waits is not None and not said:
            waits(holder)
            said = True
        time.sleep(_POLL_SECONDS)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(soft or path, ended), daemon=True, name="lock")
    beat.start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):
            os.ftruncate(handle, 0)
        if soft is not None and Holder.read(soft) == me:
            soft.unlink(missing_ok=True)
        os.close(handle)


def holder(path: Path) -> str | None:
    """Return who holds a lock; None where it is free, or there is none."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            return _named(path)
        there = Holder.read(path.with_name(f"{path.name}.held"))
        return None if there is None or there.is_gone else str(there)
    there = Holder.read(path)  # of another host, whose lock is not seen here (NFS with `nolock`)
    return str(there) if there is not None and not there.is_here and _lives(path, there) else None


def _take(path: Path, handle: int, me: Holder) -> tuple[str | None, Path | None]:
    """Return who holds the lock, None where this process does now, and the file that stands for it on other hosts.

    Between two hosts that do not see each other's flock only `link` decides, which makes a name once. Where a file
    system has flock and no links, the note in the lock's own file is all there is.
    """
    beside, flocked = path.with_name(f"{path.name}.held"), True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            return _named(path), None
        flocked = False
    before = Holder.read(beside)
    for note in (beside, path) if flocked else (beside,):
        there = Holder.read(note)
        if there is None or there == me or there.is_gone or (flocked and there.is_here):
            continue
        if (note == beside or there != before) and _lives(note, there):
            return str(there), None
    try:
        soft: Path | None = beside
        try:
            _replace(beside, before, me)
        except OSError as error:
            if not flocked or error.errno not in _NO_LINKS:
                raise
            soft = None
        if soft is not None and (winner := Holder.read(soft)) != me:
            return str(winner or "another process"), None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(me)).encode(), 0)
        os.fsync(handle)  # a client of NFS keeps what it writes for half a minute, in which others would see no holder
    except OSError as error:
        raise disk_error(error, path) from error
    return None, soft


def _replace(soft: Path, gone: Holder | None, me: Holder) -> None:
    """Put this process's note in the place of none, or of one of a process that is gone; of several, one wins."""
    draft = soft.with_name(f"{soft.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(asdict(me)), encoding="utf-8")
    try:
        if soft.exists():
            old = draft.with_suffix(".old")
            with suppress(FileNotFoundError):
                soft.rename(old)
                if Holder.read(old) not in (gone, None):  # somebody else's, who was quicker: put back
                    with suppress(FileExistsError):
                        os.link(old, soft)
                old.unlink()
        with suppress(FileExistsError):
            os.link(draft, soft)
    finally:
        draft.unlink()


def _lives(note: Path, holder: Holder) -> bool:
    """Whether a holder gives a sign of life: a process of this machine runs, another host's renews its note."""
    if holder.is_here:
        return True
    first, until = _time(note), time.monotonic() + _WATCHED
    while time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        if _time(note) != first:
            return Holder.read(note) is not None
    return False


def _time(note: Path) -> int:
    try:
        with note.open("rb") as file:  # an opened file's time is the server's, another's may be the cache's
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _beat(note: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(note)


def _named(path: Path) -> str:
    """Return who holds a file's flock: as the note says, or as the system does."""
    if (holder := Holder.read(path)) is not None:
        return str(holder)
    with suppress(OSError, ValueError, IndexError):
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                return f"another process, pid {fields[4]}"
    return "another process"


def boot() -> str:
    """Return what names this start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def started(pid: int) -> str:
    """Return the start of a process in clock ticks since boot; empty when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return "" if fields[0] in "ZX" else fields[19]
