"""`hificl ui`: the MLflow page over a folder's store; `hificl tracking-server`: one with a password, for a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.parser import CommandLine


def register(line: CommandLine) -> None:
    """Add the verbs."""
    parser = line.verb("look", "ui", _ui, "the MLflow UI over this folder's store, on loopback")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)

    parser = line.verb("cluster", "tracking-server", _serve, "an MLflow server with a password, for its head")
    parser.add_argument("--folder", default="~/.hificl/tracking", help="its secrets, artifacts and log")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    text = "postgresql+psycopg://USER@HOST/NAME (default: SQLite in the folder)"
    parser.add_argument("--database", metavar="URI", help=text)
    parser.add_argument("--artifacts", metavar="PLACE", help="a folder or s3://... (default: in the folder)")
    parser.add_argument("--detach", action="store_true", help="leave it running, and return when it answers")


def _ui(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from pipeline.config.load import PARAMS, load
    from pipeline.tracking.server import serve_page

    uri = load().tracking.uri if Path(PARAMS).is_file() else None
    serve_page(Path.cwd(), uri, host=args.host, port=args.port)


def _serve(args: argparse.Namespace) -> None:
    """Start the server."""
    from pipeline.tracking.server import start

    start(
        Path(args.folder), host=args.host, port=args.port, database=args.database, artifacts=args.artifacts,
        detach=args.detach,
    )  # fmt: skip
