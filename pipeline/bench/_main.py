"""`python -m pipeline.bench.VERB`: a verb by itself, for a machine that has torch and transformers alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any


def main(run: Callable[..., dict[str, Any]]) -> None:
    """Run a verb and print its JSON."""
    text = getattr(run, "func", run).__doc__ or ""
    parser = argparse.ArgumentParser(description=" ".join(text.split("Args:")[0].split()))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    json.dump(run(device=parser.parse_args().device), sys.stdout, indent=1, sort_keys=True, default=str)
    sys.stdout.write("\n")
