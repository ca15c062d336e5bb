"""The command line. An answer goes to standard output: JSON, alone, or a table for people; all else to standard error.

Exit status: 0 on success, 2 on bad input (one line that names what is wrong and the way out), 1 on a failure of work.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline import commands
from pipeline.commands.parser import CommandLine
from pipeline.core import machine
from pipeline.core.errors import HificlError, not_installed
from pipeline.core.terminal import print_answer

INTERRUPTED = 130


def guarded(work: Callable[[], Any], *, debug: bool = False) -> int:
    """Run `work`; print an error in one line and return the exit status."""
    try:
        work()
    except HificlError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what had finished is kept, run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and (advice := not_installed(error.name or "")):
            print(f"error: {advice}", file=sys.stderr)
            return advice.exit_code
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hificl`."""
    line = command_line()
    line.complete()
    args = line.parse_args(argv)
    if not hasattr(args, "func"):
        line.print_help(sys.stderr)
        sys.exit(2)

    def work() -> None:
        if argv is None:
            machine.go_on_plainly()
        print_answer(args.func(args), getattr(args, "form", None))

    sys.exit(guarded(work, debug=args.debug))


def command_line() -> CommandLine:
    """Return the parser with every verb."""
    line = CommandLine(
        prog="hificl", description="Adapt a frozen multimodal model by approximating in-context learning."
    )
    line.add_argument("--debug", action="store_true", help="show tracebacks")
    line.add_argument("--version", action=_Version, nargs=0, help="show the version, the commit and Python's version")
    commands.register(line)
    return line


class _Version(argparse.Action):
    """Looked up when it is asked for: git answers."""

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        from importlib.metadata import version

        import pipeline
        from pipeline.tracking.provenance import head_commit

        commit = head_commit(Path(pipeline.__path__[0]).parent)
        print(f"hificl-lab {version('hificl-lab')}, commit {commit or 'unknown'}, Python {platform.python_version()}")
        sys.exit(0)
