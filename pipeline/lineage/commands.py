"""The commands of this package for `hificl`: `register` files them with the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, WorkError

Add = Callable[[Any, str, Callable[[argparse.Namespace], Any], str], argparse.ArgumentParser]


def register(commands: Any, add: Add) -> None:
    """Add the verbs.

    Args:
        commands: the command line's subparsers.
        add: makes one: (subparsers, name, function, help).
    """
    for verb in (_study, _trace, _reproduce, _predict, _doctor, _gc):
        verb(commands, add)


def _say_and_fail(result: dict[str, Any], problem: str | None, way_out: str | None = None) -> None:
    """Print the answer, and end with status 1 where there is a problem."""
    json.dump(result, sys.stdout, indent=1, ensure_ascii=False, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if problem:
        raise WorkError(problem, way_out=way_out)


def _study(commands: Any, add: Add) -> None:
    def func(args: argparse.Namespace) -> Any:
        from pipeline.config import load
        from pipeline.lineage.study import run

        return run(args.study, load(overrides=args.set), Path.cwd())

    sub = add(commands, "study", func, "one or more studies of params.yaml: train, evaluate, report")
    sub.add_argument("study", nargs="+", metavar="S", help="`hificl studies` lists them")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of params.yaml")


def _trace(commands: Any, add: Add) -> None:
    def func(args: argparse.Namespace) -> None:
        from pipeline.config import load
        from pipeline.lineage.place import locate, locate_cell
        from pipeline.lineage.trace import trace, trace_all

        if args.all:
            if args.number is not None or args.cell is not None:
                raise InputError("--all takes a --study at most", where="trace")
            every = trace_all([args.study] if args.study else [], load(), Path.cwd())
            _say_and_fail(every, _wrong(every))
            return
        if (args.number is None) == (args.study is None) or (args.study is None) != (args.cell is None):
            raise InputError("give FILE:ROW:COLUMN, or --study S with --cell ROW:COLUMN", where="trace")
        params, evaluations = load(), Path("evaluations")
        place = (
            locate_cell(args.study, args.cell, params, evaluations)
            if args.study
            else locate(args.number, params, evaluations)
        )
        found = trace(place, params, Path.cwd())
        _say_and_fail(found, _wrong(found))

    sub = add(commands, "trace", func, "from a number in a report to its run, adapter, data and commit")
    sub.add_argument("number", nargs="?", metavar="FILE:ROW:COLUMN", help="such as reports/hificl-table1.csv:1:value")
    sub.add_argument("--study", metavar="S")
    sub.add_argument("--cell", metavar="ROW:COLUMN", help="such as hificl:coco")
    sub.add_argument("--all", action="store_true", help="every number of every report, or of the --study's")


def _wrong(found: dict[str, Any]) -> str | None:
    wrong = found["wrong"]
    return f"{len(wrong)} not as recorded: {'; '.join(wrong[:5])}" if wrong else None


def _reproduce(commands: Any, add: Add) -> None:
    def func(args: argparse.Namespace) -> None:
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
        _say_and_fail(found, problem)

    sub = add(commands, "reproduce", func, "train and evaluate a run again by its own record, and compare the numbers")
    sub.add_argument("run_id", metavar="RUN_ID")
    sub.add_argument("--tolerance", type=float, help="what the numbers may differ by (default: 0 on one CPU process)")
    sub.add_argument("--here", action="store_true", help="run the code as it is now, not the run's commit")
    sub.add_argument("--keep", metavar="FOLDER", help="keep the private store")


def _predict(commands: Any, add: Add) -> None:
    def func(args: argparse.Namespace) -> Any:
        from pipeline.lineage.predict import answer

        return answer(
            Path(args.adapter), args.image, question=args.question, task_name=args.task,
            max_new_tokens=args.max_new_tokens,
        )  # fmt: skip

    sub = add(commands, "predict", func, "one answer or caption of a trained adapter for one image")
    sub.add_argument("--adapter", required=True, metavar="DIR", help="such as runs/KEY/adapter")
    sub.add_argument("--image", required=True, metavar="F")
    sub.add_argument("--question", metavar="Q", help="left out for a caption")
    sub.add_argument("--task", help="whose prompt is used (default: the adapter's own)")
    sub.add_argument("--max-new-tokens", type=int)


def _doctor(commands: Any, add: Add) -> None:
    def func(args: argparse.Namespace) -> None:
        from pipeline.config import load
        from pipeline.lineage.doctor import examine

        found = examine(load(profile=args.profile), Path.cwd())
        bad = [check["name"] for check in found["checks"] if check["state"] == "missing"]
        _say_and_fail(found, f"missing for profile '{found['profile']}': {', '.join(bad)}" if bad else None)

    sub = add(commands, "doctor", func, "check data, weights, Java, GPUs, Ray, MLflow and disk")
    sub.add_argument("--profile", metavar="P", help="a profile of params.yaml (default: params.yaml's)")


def _gc(commands: Any, add: Add) -> None:
    def func(args: argparse.Namespace) -> Any:
        from pipeline.config import load
        from pipeline.lineage.gc import collect

        return collect(load(), Path.cwd(), remove=args.yes)

    sub = add(commands, "gc", func, "show what no report refers to; --yes removes it")
    sub.add_argument("--yes", action="store_true", help="remove what is shown")
