"""What lies on the disk is damaged, the disk is full, the clock jumps."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.checks import nothing_left, survived

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

SHIM = Path(__file__).with_name("clock.c")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(("harm", "kind"), [(truncate, "torn"), (flip, "flipped")])
def test_a_damaged_checkpoint(resumed, reference, fault, harm, kind):
    open_trials = [folder for folder in resumed.runs.glob("*/checkpoint") if not (folder.parent / "done.json").exists()]
    (folder,) = open_trials
    newest = sorted(folder.glob("epoch-*"))[-1]
    weights = sorted((p for p in newest.iterdir() if p.name != "state.json"), key=lambda p: p.stat().st_size)[-1]
    harm(weights)
    resumed.again()
    survived(resumed, reference)
    fault(kind)


def test_a_full_disk(sweep, reference, fault):
    """`runs/` is a file system of its own with room for some of the trials: ENOSPC from the kernel."""
    sweep.runs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=450k", "tmpfs", str(sweep.runs)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        sweep.begin()
        assert sweep.ended() == 1
        assert "No space left on device" in sweep.log and "free some space" in sweep.log
        gone = nothing_left(sweep)
        sweep.remember()
        assert len(sweep.seen_done) < 4
        subprocess.run(["mount", "-o", "remount,size=64m", str(sweep.runs)], check=True)
        sweep.again()
        survived(sweep, reference)
    finally:
        nothing_left(sweep)
        subprocess.run(["umount", str(sweep.runs)], check=True)
    fault("disk", gone=gone)


class Clock:
    """A wall clock that can be set: a shim between Python's processes and the kernel's clock."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        library, self.shift = folder / "clock.so", folder / "shift"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM)], check=True)
        self.shift.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(self.shift)}

    def jump(self, seconds: int) -> None:
        """Be so far ahead of the kernel's clock."""
        with self.shift.open("r+b") as file:  # the same file: it is mapped into the processes
            file.write(seconds.to_bytes(8, "little", signed=True))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


def test_a_clock_that_jumps(sweep, reference, fault, clock):
    """A day ahead in the middle, then two days back."""
    sweep.begin(**clock.environment)
    sweep.midway()
    clock.jump(86_400)
    done = len(sweep.ends())
    sweep.until(lambda: len(sweep.ends()) > done, "a trial under tomorrow's clock")
    clock.jump(-86_400)
    assert sweep.ended() == 0, sweep.log
    survived(sweep, reference)
    rows = [path.stat().st_mtime for path in sweep.runs.glob("*/done.json")]
    assert max(rows) - min(rows) < 3600  # the files' times are the kernel's, which did not jump
    assert jumped(sweep)
    fault("clock")


def jumped(sweep) -> bool:
    """Whether the processes really saw another time: MLflow has it in its metrics' times."""
    import sqlite3

    with sqlite3.connect(f"file:{sweep.folder / 'mlflow.db'}?mode=ro", uri=True) as db:
        first, last = db.execute("select min(timestamp), max(timestamp) from metrics").fetchone()
    return last / 1000 - time.time() > 40_000 or time.time() - first / 1000 > 40_000


def test_the_shim_shifts_the_clock(clock):
    clock.jump(86_400)
    code = "import time; print(time.time(), time.monotonic())"
    said = subprocess.check_output(["python3", "-c", code], env={**os.environ, **clock.environment}, text=True)
    wall, monotonic = map(float, said.split())
    assert 86_000 < wall - time.time() < 87_000 and abs(monotonic - time.monotonic()) < 60
