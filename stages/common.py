"""What the stages share: read params, say errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipeline.cli import guarded
from pipeline.config import Params, load


def run(stage: Callable[[Params], None]) -> None:
    """Run a stage on params.yaml and exit with its status."""
    sys.exit(guarded(lambda: stage(load())))
