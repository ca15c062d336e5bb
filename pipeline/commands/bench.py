"""`hificl bench`: ratios that are measured in alternation in one run."""

from __future__ import annotations

import argparse
from typing import Any

from pipeline.commands.parser import CommandLine
from pipeline.errors import InputError


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("numbers", "bench", bench, "measure ratios in alternation in one run")
    parser.add_argument("verb", nargs="?")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/<verb>-<device>.json")
    parser.add_argument("--list", action="store_true", help="print the verbs, one a line")
    parser.add_argument("--table", action="store_true", help="print benchmarks/*.json as Markdown")
    text = "with --table: also write it between the marks of a document"
    parser.add_argument("--into", metavar="FILE", help=text)


def bench(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, or print what can be or was measured."""
    from pipeline import bench as benchmarks

    if args.list or args.table:
        print("\n".join(benchmarks.verbs()) if args.list else benchmarks.table(into=args.into))
        return None
    if args.verb is None:
        raise InputError("which benchmark?", way_out=f"One of {', '.join(benchmarks.verbs())}, or --list")
    return benchmarks.run(args.verb, device=args.device, save=args.save)
