"""The commands of this package for `hificl`: `register` files them with the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.arguments import CommandLine
from pipeline.errors import InputError
from pipeline.terminal import Answer, Facts


def register(line: CommandLine) -> None:
    """Add the verbs."""
    for verb in (_trace, _predict, _doctor, _reproduce, _gc):
        verb(line)


def _trace(line: CommandLine) -> None:
    def func(args: argparse.Namespace) -> Answer:
        from pipeline.config import load
        from pipeline.lineage.place import locate, locate_cell
        from pipeline.lineage.trace import trace, trace_all
        from pipeline.lineage.traced import Traced

        if args.all:
            if args.number is not None or args.cell is not None:
                raise InputError("--all takes a --study at most", where="trace")
            return Traced(trace_all([args.study] if args.study else [], load(), Path.cwd()))
        if (args.number is None) == (args.study is None) or (args.study is None) != (args.cell is None):
            raise InputError("give FILE:ROW:COLUMN, or --study S with --cell ROW:COLUMN", where="trace")
        params, evaluations = load(), Path("evaluations")
        place = (
            locate_cell(args.study, args.cell, params, evaluations)
            if args.study
            else locate(args.number, params, evaluations)
        )
        return Traced(trace(place, params, Path.cwd()))

    sub = line.verb("look", "trace", func, "from a number to its run, adapter, data and commit", answers=True)
    sub.add_argument("number", nargs="?", metavar="FILE:ROW:COLUMN", help="such as reports/hificl-table1.csv:1:value")
    sub.add_argument("--study", metavar="S")
    sub.add_argument("--cell", metavar="ROW:COLUMN", help="such as hificl:coco")
    sub.add_argument("--all", action="store_true", help="every number of every report, or of the --study's")


def _reproduce(line: CommandLine) -> None:
    def func(args: argparse.Namespace) -> Answer:
        from pipeline.config import load
        from pipeline.lineage.reproduce import reproduce
        from pipeline.sweep.signals import as_interrupt

        with as_interrupt():  # so that the worktree is removed
            found = reproduce(
                args.run_id, load(), Path.cwd(), tolerance=args.tolerance, here=args.here,
                keep=Path(args.keep) if args.keep else None,
            )  # fmt: skip
        gap, allowed = found["largest_difference"], found["tolerance"]
        problem = None if found["reproduced"] else f"{args.run_id} differs by {gap:g}, the tolerance is {allowed:g}"
        return Facts(found, problem)

    sub = line.verb("check", "reproduce", func, "train and score a run again by its own record", answers=True)
    sub.add_argument("run_id", metavar="RUN_ID")
    sub.add_argument("--tolerance", type=float, help="what the numbers may differ by (default: 0 on one CPU process)")
    sub.add_argument("--here", action="store_true", help="run the code as it is now, not the run's commit")
    sub.add_argument("--keep", metavar="FOLDER", help="keep the private store")


def _predict(line: CommandLine) -> None:
    def func(args: argparse.Namespace) -> Answer:
        from pipeline.lineage.predict import answer

        return answer(
            Path(args.adapter), args.image, question=args.question, task_name=args.task,
            max_new_tokens=args.max_new_tokens,
        )  # fmt: skip

    sub = line.verb("look", "predict", func, "an adapter's answer to a question about a picture", answers=True)
    sub.add_argument("--adapter", required=True, metavar="DIR", help="such as runs/KEY/adapter")
    sub.add_argument("--image", required=True, metavar="F")
    sub.add_argument("--question", metavar="Q", help="left out for a caption")
    sub.add_argument("--task", help="whose prompt is used (default: the adapter's own)")
    sub.add_argument("--max-new-tokens", type=int)


def _doctor(line: CommandLine) -> None:
    def func(args: argparse.Namespace) -> Answer:
        from pipeline.config import load
        from pipeline.lineage.doctor import examine

        return examine(load(profile=args.profile), Path.cwd())

    sub = line.verb("check", "doctor", func, "data, weights, Java, GPUs, Ray, MLflow and disk", answers=True)
    sub.add_argument("--profile", metavar="P", help="a profile (default: params.yaml's)")


def _gc(line: CommandLine) -> None:
    def func(args: argparse.Namespace) -> Answer:
        from pipeline.config import load
        from pipeline.lineage.gc import collect

        return Facts(collect(load(), Path.cwd(), remove=args.yes))

    sub = line.verb("check", "gc", func, "show what no report refers to; --yes removes it", answers=True)
    sub.add_argument("--yes", action="store_true", help="remove what is shown")
