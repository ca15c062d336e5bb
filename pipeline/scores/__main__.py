"""`python -m pipeline.scores vqa --results ..`: the scorers without the rest of the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pipeline.errors import HificlError
from pipeline.scores.commands import register


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores as JSON and return the exit status (2 bad input, 1 failed work)."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.scores", description=__doc__)
    register(parser.add_subparsers(required=True, metavar="SCORE"))
    args = parser.parse_args(arguments)
    try:
        print(json.dumps(args.func(args)))
    except HificlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
