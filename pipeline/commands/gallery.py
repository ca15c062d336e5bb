"""`hificl gallery`: a Markdown page of the report's figures, and tables in documents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.commands.parser import CommandLine


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("look", "gallery", gallery, "a Markdown page of the report's figures")
    parser.add_argument("--out", default="docs/gallery.md", metavar="FILE")
    text = "also write tables between the marks of a document"
    parser.add_argument("--into", action="append", default=[], metavar="FILE", help=text)


def gallery(args: argparse.Namespace) -> dict[str, Any]:
    """Write the page and return what is on it."""
    from pipeline.config.load import load
    from pipeline.report import gallery as documents
    from pipeline.report.gallery import write_gallery

    params, evaluations = load(), Path("evaluations")
    filled = {path: documents.write_into(Path(path), params, evaluations) for path in args.into}
    return {"page": args.out, "studies": write_gallery(params, evaluations, Path(args.out)), "filled": filled}
