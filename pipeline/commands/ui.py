"""`hificl ui`: the MLflow UI over a folder's store."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.parser import CommandLine


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("look", "ui", ui, "the MLflow UI over this folder's store, on loopback")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)


def ui(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from pipeline.config.load import PARAMS, load
    from pipeline.tracking.server import serve_page

    uri = load().tracking.uri if Path(PARAMS).is_file() else None
    serve_page(Path.cwd(), uri, host=args.host, port=args.port)
