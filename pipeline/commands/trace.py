"""`hificl trace`: from a number to what it was made from; `hificl reproduce`: a run again by its own record."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, study_names
from pipeline.core.errors import InputError
from pipeline.core.terminal import Answer, Facts, short, table

if TYPE_CHECKING:
    from rich.console import RenderableType

_DIGITS = 12  # of a digest


def register(line: CommandLine) -> None:
    """Add the verbs."""
    parser = line.verb("look", "trace", trace, "from a number to its run, adapter, data and commit", answers=True)
    shown = "such as reports/hificl-table1.csv:1:value"
    parser.add_argument("number", nargs="?", metavar="FILE:ROW:COLUMN", help=shown)
    study_names(parser.add_argument("--study", metavar="S"))
    parser.add_argument("--cell", metavar="ROW:COLUMN", help="such as hificl:coco")
    parser.add_argument("--all", action="store_true", help="every number of every report, or of the --study's")

    parser = line.verb("check", "reproduce", reproduce, "train and score a run again by its own record", answers=True)
    parser.add_argument("run_id", metavar="RUN_ID")
    text = "what the numbers may differ by (default: 0 on one CPU process)"
    parser.add_argument("--tolerance", type=float, help=text)
    parser.add_argument("--here", action="store_true", help="run the code as it is now, not the run's commit")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the private store")


def trace(args: argparse.Namespace) -> Traced:
    """Return what one number, or every number, was made from.

    Raises:
        InputError: not exactly one way to name what is traced, or no such number.
    """
    from pipeline.config.load import load
    from pipeline.lineage import trace as lineage
    from pipeline.lineage.place import locate, locate_cell

    if args.all:
        if args.number is not None or args.cell is not None:
            raise InputError("--all takes a --study at most", where="trace")
        return Traced(lineage.trace_all([args.study] if args.study else [], load(), Path.cwd()))
    if (args.number is None) == (args.study is None) or (args.study is None) != (args.cell is None):
        raise InputError("give FILE:ROW:COLUMN, or --study S with --cell ROW:COLUMN", where="trace")
    params, evaluations = load(), Path("evaluations")
    place = (
        locate_cell(args.study, args.cell, params, evaluations)
        if args.study
        else locate(args.number, params, evaluations)
    )
    return Traced(lineage.trace(place, params, Path.cwd()))


@dataclass(frozen=True)
class Traced(Answer):
    """The answer of `trace.trace` or `trace.trace_all`."""

    found: Mapping[str, Any]

    def record(self) -> Any:
        """Return the answer."""
        return self.found

    @property
    def problem(self) -> str | None:
        """What is not as it was recorded."""
        wrong = self.found["wrong"]
        return f"{len(wrong)} not as recorded: {'; '.join(wrong[:5])}" if wrong else None

    def shown(self) -> Iterator[RenderableType]:
        """Give the number, the way of each seed, and how many checks of each kind came out how."""
        from pipeline.lineage.checks import SAME, UNRECORDED

        if "cell" not in self.found:
            yield from self._all()
            return
        cell = self.found["cell"]
        spread = "" if cell["std"] is None else f" ± {short(cell['std'])}"
        yield f"{cell['study']}: {cell['method']} on {cell['task']}, {cell['backbone']}"
        yield f"{cell['metric']} {short(cell['value'])}{spread} ({cell['unit']})\n"
        for link in self.found["chain"]:
            yield f"seed {link['seed']}: {short(link['value'])}"
            yield from (f"  {name:12}{text}" for name, text in _way(link) if text)
        yield ""
        counts: dict[str, Counter[str]] = {}
        for check in self.found["checks"]:
            counts.setdefault(check["what"], Counter())[check["state"]] += 1
        made = table("checked", "as recorded", "not recorded", "wrong", right=("as recorded", "not recorded", "wrong"))
        for what, states in counts.items():
            wrong = states.total() - states[SAME] - states[UNRECORDED]
            made.add_row(what, str(states[SAME]), str(states[UNRECORDED]), str(wrong), style="red" if wrong else "")
        yield made

    def _all(self) -> Iterator[RenderableType]:
        made = table("study", "numbers", "without one", "seeds", right=("numbers", "without one", "seeds"))
        for name, row in self.found["studies"].items():
            made.add_row(name, str(row["numbers"]), str(row["without_a_number"]), str(row["seeds"]))
        yield made
        yield f"\n{self.found['runs']} runs, {self.found['checks']:,} checks, {len(self.found['wrong'])} wrong"


def _way(link: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the stations of one seed's way, by name, with what names each."""
    run, adapter, data, backbone, code = (
        link.get(name) or {} for name in ("run", "adapter", "data", "backbone", "code")
    )
    yield "evaluation", link["evaluation"]
    yield "run", " ".join(str(run[name]) for name in ("run_id", "name", "status") if run.get(name))
    yield "trial", f"runs/{link['trial']}"
    if adapter:
        yield (
            "adapter",
            f"{adapter['folder']}, sha256 {str(adapter['digest'])[:_DIGITS]}, epoch {short(adapter['epoch'])}",
        )
    if data.get("sources"):
        files = f"{len(data['sources'])} files and {data['images']:,} images below {data['root']}"
        yield "data", f"{data['manifest']}, digest {data['digest'][:_DIGITS]}: {files}"
    if backbone:
        yield "backbone", f"{backbone['name']}, digest {str(backbone['digest'])[:_DIGITS]}"
    if code:
        changed = f", with changes in {', '.join(code['changed'][:3])}" if code.get("dirty") else ""
        yield "commit", f"{code['commit'] or 'not recorded'}{changed}"


def reproduce(args: argparse.Namespace) -> Answer:
    """Return both numbers and how they differ; more than the tolerance is a problem."""
    from pipeline.config.load import load
    from pipeline.lineage import reproduce as lineage
    from pipeline.pool.processes import as_interrupt

    with as_interrupt():  # so that the worktree is removed
        compared = lineage.reproduce(
            args.run_id, load(), Path.cwd(), tolerance=args.tolerance, here=args.here,
            keep=Path(args.keep) if args.keep else None,
        )  # fmt: skip
    gap, allowed = compared["largest_difference"], compared["tolerance"]
    problem = None if compared["reproduced"] else f"{args.run_id} differs by {gap:g}, the tolerance is {allowed:g}"
    return Facts(compared, problem)
