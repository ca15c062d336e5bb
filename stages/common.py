"""What the stages share: read params, say errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pipeline.cli import INTERRUPTED, guarded
from pipeline.config import Params, load


def run(stage: Callable[[Params], None]) -> None:
    """Run a stage on params.yaml and exit with its status."""
    status = guarded(lambda: stage(load()))
    if status == INTERRUPTED:  # in order so far, and Python's own way out of so many packages takes seconds
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
