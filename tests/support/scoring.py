"""`hificl score` in this process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline import cli


def main(arguments: Sequence[str]) -> int:
    """Print the scores as JSON and return the exit status."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["score", *arguments])
    return int(ended.value.code or 0)
