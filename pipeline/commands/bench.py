"""`hificl bench`: ratios that are measured in alternation in one run."""

from __future__ import annotations

import argparse
from importlib import import_module, util
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine
from pipeline.core.errors import InputError

if TYPE_CHECKING:
    from pipeline.core.plain_yaml import Json


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("numbers", "bench", _bench, "measure ratios in alternation in one run")
    parser.add_argument("verb", nargs="?")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu for all but cuda")
    parser.add_argument("--minutes", type=float, help="of bench cuda: all that it may take; 9 unless given")
    parser.add_argument("--out", metavar="FOLDER", help="of bench cuda: for cuda.jsonl; runs/bench unless given")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/<verb>-<device>.json")
    parser.add_argument("--list", action="store_true", help="print the verbs, one a line")
    parser.add_argument("--table", action="store_true", help="print benchmarks/*.json as Markdown")
    text = "with --table: also write it between the marks of a document"
    parser.add_argument("--into", metavar="FILE", help=text)


def _bench(args: argparse.Namespace) -> Json | None:
    """Measure, or print what can be or was measured."""
    benchmarks = _installed()
    if args.list or args.table:
        print("\n".join(benchmarks.verbs()) if args.list else benchmarks.table(into=args.into))
        return None
    if args.verb is None:
        raise InputError("which benchmark?", way_out=f"One of {', '.join(benchmarks.verbs())}, or --list")
    return benchmarks.run(args.verb, device=args.device, save=args.save, minutes=args.minutes, out=args.out)


def _installed() -> ModuleType:
    """Return the package of the benchmarks: it lies beside this one, imports it, and is not imported by it.

    Raises:
        InputError: this is a copy without it.
    """
    spec = util.find_spec("benchmarks")
    if spec is None or spec.origin is None:  # not there, or a folder of results alone
        way_out = "Run it in a checkout of hificl-lab after make setup, which installs its folder benchmarks/ too"
        raise InputError("the benchmarks are not installed", way_out=way_out)
    return import_module("benchmarks")
