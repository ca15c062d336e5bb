"""The command line. An answer goes to standard output: JSON, alone, or a table for people; all else to standard error.

Exit status: 0 on success, 2 on bad input (one line that names what is wrong and the way out), 1 on a failure of work.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline import plain_paths
from pipeline.arguments import CommandLine, Parser
from pipeline.errors import HificlError, InputError
from pipeline.lineage import commands as lineage
from pipeline.terminal import Answer, Facts, write

INTERRUPTED = 130


def guarded(work: Callable[[], Any], *, debug: bool = False) -> int:
    """Run `work`; print an error in one line and return the exit status."""
    try:
        work()
    except HificlError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what had finished is kept, run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hificl`."""
    line = _parser()
    args = line.parse_args(argv)
    if not hasattr(args, "func"):
        line.print_help(sys.stderr)
        sys.exit(2)

    def work() -> None:
        if argv is None:
            plain_paths.go_on_plainly()
        write(args.func(args), getattr(args, "form", None))

    sys.exit(guarded(work, debug=args.debug))


def _parser() -> CommandLine:
    line = CommandLine(
        prog="hificl", description="Adapt a frozen multimodal model by approximating in-context learning."
    )
    line.add_argument("--debug", action="store_true", help="show tracebacks")
    line.add_argument("--version", action=_Version, nargs=0, help="show the version, the commit and Python's version")
    _run(line)
    _look(line)
    lineage.register(line)
    _pages(line)
    _check(line)
    _names(line)
    _numbers(line)
    _miniature(line)
    _cluster(line)
    return line


class _Version(argparse.Action):
    """Looked up when it is asked for: git answers."""

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        from importlib.metadata import version

        import pipeline
        from pipeline.tracking.provenance import head_commit

        commit = head_commit(Path(pipeline.__path__[0]).parent)
        print(f"hificl-lab {version('hificl-lab')}, commit {commit or 'unknown'}, Python {platform.python_version()}")
        sys.exit(0)


def _settable(sub: Parser) -> None:
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of params.yaml")


def _run(line: CommandLine) -> None:
    def study(args: argparse.Namespace) -> Answer:
        from pipeline.config import load
        from pipeline.lineage.study import run

        return run(args.study, load(overrides=args.set), Path.cwd())

    sub = line.verb("run", "study", study, "one or more studies: train, evaluate, report", answers=True)
    sub.add_argument("study", nargs="+", metavar="S", help="`hificl studies` lists them")
    _settable(sub)

    def sweep(args: argparse.Namespace) -> None:
        from pipeline.config import load

        params = load(overrides=args.set)  # what is wrong with it is said here, not in a job's log
        if args.attach or args.submit:
            from pipeline.sweep import job

            chosen = [*_repeated("--study", args.study or []), *_repeated("--set", args.set)]
            sys.exit(job.attach() if args.attach else job.submit(chosen))
        from pipeline.sweep.run import sweep

        sweep(params, args.study or params.run.studies)

    sub = line.verb("run", "sweep", sweep, "train the trials that are open; safe to kill and to run again")
    how = sub.add_mutually_exclusive_group()
    how.add_argument(
        "--submit", action="store_true", help="as a job of the Ray cluster whose head this is, and follow it"
    )
    how.add_argument("--attach", action="store_true", help="follow the sweep that was submitted from this folder")
    sub.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)")
    _settable(sub)

    def workspace(args: argparse.Namespace) -> None:
        from pipeline.workspace import create

        create(Path(args.folder), profile=args.profile, data=Path(args.data) if args.data else None)

    sub = line.verb("run", "workspace", workspace, "make a folder that runs another profile beside this one")
    sub.add_argument("folder")
    sub.add_argument("--profile", required=True)
    sub.add_argument("--data", help="folder of the official files")


def _repeated(flag: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def _look(line: CommandLine) -> None:
    def where(_: argparse.Namespace) -> Answer:
        from pipeline.workspace import whereabouts

        return whereabouts(Path.cwd())

    line.verb("look", "where", where, "where the report and the MLflow store of this folder are", answers=True)

    def studies(args: argparse.Namespace) -> Answer:
        from pipeline.config import load
        from pipeline.sweep.overview import overview

        return overview(load(overrides=args.set))

    _settable(line.verb("look", "studies", studies, "every study, its trials done and open", answers=True))

    def results(args: argparse.Namespace) -> Answer:
        from pipeline import report
        from pipeline.config import load
        from pipeline.report.results import StudyResults

        params, evaluations = load(), Path("evaluations")
        return StudyResults([report.load_table(name, params, evaluations) for name in args.study or params.run.studies])

    sub = line.verb("look", "results", results, "what studies came out as: the report's tables", answers=True)
    sub.add_argument("study", nargs="*", metavar="S", help="a study that is evaluated (default: the profile's)")

    def trials(args: argparse.Namespace) -> Answer:
        from pipeline.config import load
        from pipeline.sweep.trials import Trials, trial_rows

        params = load(overrides=args.set, profile=args.profile)
        return Trials(trial_rows(params, args.study or params.run.studies))

    sub = line.verb("look", "trials", trials, "what would train: every setting, and where it is from", answers=True)
    sub.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)")
    sub.add_argument("--profile", metavar="P", help="a profile (default: params.yaml's)")
    _settable(sub)


def _pages(line: CommandLine) -> None:
    def ui(args: argparse.Namespace) -> None:
        from pipeline.config import PARAMS, load
        from pipeline.tracking.ui import serve

        uri = load().tracking.uri if Path(PARAMS).is_file() else None
        serve(Path.cwd(), uri, host=args.host, port=args.port)

    sub = line.verb("look", "ui", ui, "the MLflow UI over this folder's store, on loopback")
    sub.add_argument("--host", default="127.0.0.1")
    sub.add_argument("--port", type=int, default=5000)

    def gallery(args: argparse.Namespace) -> Any:
        from pipeline.config import load
        from pipeline.report import documents
        from pipeline.report.pictures import write_gallery

        params, evaluations = load(), Path("evaluations")
        filled = {path: documents.write_into(Path(path), params, evaluations) for path in args.into}
        return {"page": args.out, "studies": write_gallery(params, evaluations, Path(args.out)), "filled": filled}

    sub = line.verb("look", "gallery", gallery, "a Markdown page of the report's figures")
    sub.add_argument("--out", default="docs/gallery.md", metavar="FILE")
    sub.add_argument(
        "--into", action="append", default=[], metavar="FILE", help="also write tables between the marks of a document"
    )


def _check(line: CommandLine) -> None:
    def plan(args: argparse.Namespace) -> Answer:
        from pipeline.cost.hours import Rates
        from pipeline.sweep.forecast import plan

        rates = Rates(args.peak_tflops, args.bandwidth_tb, args.utilisation)
        return Facts(plan(args.study, gpus=args.gpus, rates=rates, profile=args.profile, overrides=args.set))

    sub = line.verb("check", "plan", plan, "the GPU-hours of a study on the real backbones", answers=True)
    sub.add_argument("--study", required=True)
    sub.add_argument("--gpus", type=int, default=1)
    sub.add_argument("--utilisation", type=float, default=0.4, help="share of peak that is reached (default: 0.4)")
    sub.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 (default: an H100's 989)")
    sub.add_argument("--bandwidth-tb", type=float, default=3.35, help="memory, TB/s (default: an H100's 3.35)")
    sub.add_argument("--profile", default="real")
    _settable(sub)

    def params(args: argparse.Namespace) -> Answer:
        from pipeline.counting import count

        return count(args.backbone, args.method, args.set)

    sub = line.verb("check", "params", params, "a method's trainable parameters on a real backbone", answers=True)
    sub.add_argument("--backbone", required=True)
    sub.add_argument("--method", required=True)
    _settable(sub)


def _names(line: CommandLine) -> None:
    def listed(kind: str) -> Callable[[argparse.Namespace], Answer]:
        def func(_: argparse.Namespace) -> Answer:
            from pipeline import catalogue

            return catalogue.LISTS[kind]()

        return func

    for kind, text in (
        ("methods", "what adapts a model: every method and its options"),
        ("backbones", "what is adapted: every backbone and its class"),
        ("tasks", "what is asked: every task and its score"),
    ):
        line.verb("names", kind, listed(kind), text, answers=True)


def _numbers(line: CommandLine) -> None:
    from pipeline.scores import commands as scores

    sub = line.family("numbers", "score", "score a file of predictions with the official metrics")
    scores.register(sub.add_subparsers(title="what is scored", metavar="KIND", required=True, parser_class=Parser))

    def bench(args: argparse.Namespace) -> Any:
        from pipeline import bench

        if args.list or args.table:
            print("\n".join(bench.verbs()) if args.list else bench.table(into=args.into))
            return None
        if args.verb is None:
            raise InputError("which benchmark?", way_out=f"One of {', '.join(bench.verbs())}, or --list")
        return bench.run(args.verb, device=args.device, save=args.save)

    sub = line.verb("numbers", "bench", bench, "measure ratios in alternation in one run")
    sub.add_argument("verb", nargs="?")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sub.add_argument("--save", action="store_true", help="also write benchmarks/<verb>-<device>.json")
    sub.add_argument("--list", action="store_true", help="print the verbs, one a line")
    sub.add_argument("--table", action="store_true", help="print benchmarks/*.json as Markdown")
    sub.add_argument("--into", metavar="FILE", help="with --table: also write it between the marks of a document")


def _miniature(line: CommandLine) -> None:
    def pretrain(args: argparse.Namespace) -> None:
        from pipeline.miniature.pretrain import NUM_THREADS, pretrain
        from pipeline.progress import bar
        from pipeline.report.emergence import draw
        from pipeline.tracking.provenance import head_commit

        with bar(f"pretrain {args.backbone}") as progress:
            pretrain(
                args.backbone, Path(args.out), seed=args.seed, size=args.size, device=args.device,
                commit=head_commit(), progress=progress, num_threads=args.threads or NUM_THREADS,
            )  # fmt: skip
        draw(Path(args.out), Path(args.out) / "pretraining.svg")

    def world(args: argparse.Namespace) -> Any:
        from pipeline.miniature.world import write_world

        written = write_world(
            Path(args.folder), seed=args.seed, num_train_images=args.num_train_images,
            num_val_images=args.num_val_images, difficulty=args.difficulty,
        )  # fmt: skip
        if args.picture:
            from pipeline.report.world import draw

            draw(Path(args.folder), Path(args.picture))
        return written

    sub = line.verb("miniature", "world", world, "write its pictures and annotations, in the official formats")
    sub.add_argument("folder")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--num-train-images", type=int, default=2500)
    sub.add_argument("--num-val-images", type=int, default=2500)
    sub.add_argument("--difficulty", type=float, default=0.2)
    sub.add_argument("--picture", metavar="FILE", help="also draw the first pictures with their texts, as PNG")

    sub = line.verb("miniature", "pretrain", pretrain, "make one of its backbones from nothing")
    sub.add_argument("backbone")
    sub.add_argument("--out", required=True)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--size", default="small", help="small, or large: 17 million parameters, for a GPU")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sub.add_argument("--threads", type=int, help="another number than the usual two rounds sums otherwise")


def _cluster(line: CommandLine) -> None:
    def server(args: argparse.Namespace) -> None:
        from pipeline.tracking.server import start

        start(
            Path(args.folder), host=args.host, port=args.port, database=args.database, artifacts=args.artifacts,
            detach=args.detach,
        )  # fmt: skip

    sub = line.verb("cluster", "tracking-server", server, "an MLflow server with a password, for its head")
    sub.add_argument("--folder", default="~/.hificl/tracking", help="its secrets, artifacts and log")
    sub.add_argument("--host", default="127.0.0.1")
    sub.add_argument("--port", type=int, default=5000)
    sub.add_argument(
        "--database", metavar="URI", help="postgresql+psycopg://USER@HOST/NAME (default: SQLite in the folder)"
    )
    sub.add_argument("--artifacts", metavar="PLACE", help="a folder or s3://... (default: in the folder)")
    sub.add_argument("--detach", action="store_true", help="leave it running, and return when it answers")


__all__ = ["guarded", "main", "InputError"]
