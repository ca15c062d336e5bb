"""A lock is one process's at a time, with flock and without, and a killed process holds none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.core import locks
from pipeline.core.errors import InputError, WorkError
from pipeline.core.locks import Holder, held

WITHOUT = "import fcntl, errno\ndef none(*_): raise OSError(errno.ENOSYS, 'no flock')\nfcntl.flock = none\n"
HOLD = """
import sys, time
from pathlib import Path
from pipeline.core.locks import held
with held(Path(sys.argv[1]), "a sweep"):
    print("held", flush=True)
    time.sleep(60)
"""
ADD = """
import sys
from pathlib import Path
from pipeline.core.locks import held
path = Path(sys.argv[1])
for _ in range(5):
    with held(path, "an adder", wait=60):
        count = int((path.parent / "count").read_text())
        (path.parent / "count").write_text(str(count + 1))
"""


@pytest.fixture(params=["flock", "none"])
def system(request, monkeypatch) -> str:
    """A file system with flock, and one without; returns the line that makes another process's the same."""
    if request.param == "flock":
        return ""

    def none(*_):
        raise OSError(errno.ENOSYS, "no flock")

    monkeypatch.setattr(fcntl, "flock", none)
    return WITHOUT


def start(code: str, path: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


def test_a_living_holder_is_named_and_a_killed_one_holds_nothing(tmp_path, system):
    path = tmp_path / "runs/.lock"
    other = start(system + HOLD, path)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=rf"runs: held by a sweep, pid {other.pid} on .* Wait for it"),
            held(path, "x"),
        ):
            pass
    finally:
        other.kill()
        other.wait()
    with held(path, "an evaluation"):
        pass
    with held(path, "another one"):
        assert [file.name for file in path.parent.glob("*.held.*")] == []


def test_of_several_processes_one_holds_it(tmp_path, system):
    (tmp_path / "count").write_text("0")
    others = [start(system + ADD, tmp_path / "lock") for _ in range(3)]
    assert [other.wait(120) for other in others] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "15"


@pytest.mark.parametrize("note", [".lock", ".lock.held"])
@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_on_another_host_lives_as_long_as_its_note_is_renewed(tmp_path, monkeypatch, lives, note):
    """Its flock is not seen here, as where NFS is mounted with `nolock`."""
    monkeypatch.setattr(locks, "_WATCHED", 1.5)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.1)
    path = tmp_path / ".lock"
    (tmp_path / note).write_text(json.dumps(asdict(replace(Holder.here("a sweep"), host="node-7", pid=12))))
    ended = threading.Event()
    if lives:
        monkeypatch.setattr(locks, "BEAT_SECONDS", 0.3)
        threading.Thread(target=locks._beat, args=(tmp_path / note, ended), daemon=True).start()
    try:
        if lives:
            with pytest.raises(InputError, match="held by a sweep, pid 12 on node-7"), held(path, "x"):
                pass
        else:
            with held(path, "x"):
                assert Holder.read(path).pid == os.getpid()
    finally:
        ended.set()


def test_a_program_that_leaves_no_note_is_named_by_its_process(tmp_path):
    path = tmp_path / "mlflow.db.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=rf"mlflow.db.lock: held by another process, pid {os.getpid()}"):
            with held(path, "x", wait=0.1):
                pass


@pytest.mark.parametrize("note", [b"", b"\xff", b"[]", b"5", b"{}", b'{"what": 3}', b"a sweep, pid 1 on x"])
def test_a_note_of_something_else_holds_nothing(tmp_path, note):
    (tmp_path / ".lock").write_bytes(note)
    with held(tmp_path / ".lock", "x"):
        pass


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(WorkError, match=r"runs/.lock: cannot be written"), held(tmp_path / "runs/.lock", "x"):
        pass


def test_the_note_leaves_this_machine_at_once(tmp_path, monkeypatch):
    """A client of NFS sends what it has written when it is synced, or closed."""
    sent, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sent.append(os.fstat(handle).st_ino), sync(handle)))
    with held(tmp_path / ".lock", "x"):
        assert (tmp_path / ".lock").stat().st_ino in sent
        notes = [Holder.read(tmp_path / name) for name in (".lock", ".lock.held")]
        assert [note.pid for note in notes] == [os.getpid()] * 2
    assert not (tmp_path / ".lock.held").exists()


def test_a_file_system_with_locks_and_without_links_locks(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with held(tmp_path / ".lock", "x"):
        assert Holder.read(tmp_path / ".lock").pid == os.getpid()
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_a_note_that_cannot_be_written_holds_nothing_afterwards(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WorkError, match="No space left"), held(tmp_path / ".lock", "x"):
            pass
    with held(tmp_path / ".lock", "x"):  # by the same process, which does not wait for itself
        pass


def test_a_holder_on_another_host_whose_lock_is_not_seen_here_is_named_while_it_gives_signs_of_life(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(locks, "_WATCHED", 1.0)
    path, ended = tmp_path / "lock", threading.Event()
    path.write_text(json.dumps(asdict(replace(Holder.here("a task"), host="another-host"))))
    assert locks.holder(path) is None  # it was killed
    beat = threading.Thread(target=lambda: [os.utime(path) for _ in range(100) if not ended.wait(0.1)])
    beat.start()
    try:
        assert locks.holder(path).startswith("a task, pid ") and "another-host" in locks.holder(path)
    finally:
        ended.set()
        beat.join()
    path.write_text("")
    assert locks.holder(path) is None  # it let go
