"""What the stages share: read params, say errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.cli import INTERRUPTED, guarded
from pipeline.config.load import FOLDERS, PARAMS, Params, load
from pipeline.core import copies, machine
from pipeline.core.errors import WorkError


def run(stage: Callable[[Params], None]) -> None:
    """Run a stage on params.yaml and exit with its status."""

    def work() -> None:
        machine.go_on_plainly()
        copies.join(Path.cwd())
        before = _written()
        stage(load())
        changed = sorted(name for name, text in _written().items() if before.get(name) != text)
        if changed:  # DVC reads them once more when a stage ends, and would record values that were not used
            raise WorkError(
                "changed while the stage ran, which worked with what stood there before", where=", ".join(changed),
                way_out="Run the same command again; what is done is kept",
            )  # fmt: skip

    status = guarded(work)
    if status == INTERRUPTED:  # in order so far, and Python's own way out of so many packages takes seconds
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _written() -> dict[str, str]:
    """Return the text of params.yaml and of every profile and study, by name."""
    paths = [Path(PARAMS), *(path for folder in FOLDERS.values() for path in Path(folder).glob("*.yaml"))]
    return {str(path): path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}
