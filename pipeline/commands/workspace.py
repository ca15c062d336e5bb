"""`hificl workspace`: a folder beside this one that runs another profile; `hificl gc`: what no report refers to.

`hificl stop`, `resume`, `clone`, `extend`, `acts`, `steer`: what is done to its trials by hand.
`hificl world` and `hificl pretrain`: what the miniature's workspaces are made of, its pictures and its backbones.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, Parser, profile_name, study_names
from pipeline.core.errors import HificlError, InputError
from pipeline.core.terminal import Answer, Fields, Rows

if TYPE_CHECKING:
    from pipeline.config.load import Params
    from pipeline.records.evaluation import Evaluations
    from pipeline.records.store import TrialStore
    from pipeline.records.trial import Act


WORLDS_HELP = "1; 2: harder to see and to learn; 3: demonstrations have to be looked at"


def register(line: CommandLine) -> None:
    """Add the verbs."""
    parser = line.verb("run", "workspace", _workspace, "make a folder that runs another profile beside this one")
    parser.add_argument("folder")
    profile_name(parser.add_argument("--profile", required=True))
    parser.add_argument("--data", help="folder of the official files")

    parser = line.verb("check", "gc", _gc, "show what no report refers to; --yes removes it", answers=True)
    parser.add_argument("--yes", action="store_true", help="remove what is shown")
    _register_acts(line)
    _register_miniature(line)


def _register_acts(line: CommandLine) -> None:
    parser = line.verb("by hand", "stop", _stop, "stop trials behind the epoch in which they are", answers=True)
    _trials(parser)
    parser.add_argument("--after", type=int, metavar="N", help="behind epoch N instead")
    _trials(line.verb("by hand", "resume", _resume, "let trials go on that were stopped by hand", answers=True))
    text = "trials like another but for --set or --grid (by-hand)"
    parser = line.verb("by hand", "clone", _clone, text, answers=True)
    _trials(parser, several=False)
    text = "an option of its method, or a training setting; several times"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)
    text = "one such trial for each value, of several settings for each point"
    parser.add_argument("--grid", action="append", default=[], metavar="NAME=A,B", help=text)
    text = "a trial that goes on where another ended (study by-hand)"
    parser = line.verb("by hand", "extend", _extend, text, answers=True)
    _trials(parser, several=False)
    parser.add_argument("--epochs", type=int, required=True, metavar="N", help="in all, those of the other included")
    line.verb("by hand", "acts", _acts, "what was done to trials by hand, oldest first", answers=True)
    text = "a page on loopback: trials, curves, buttons for all this"
    parser = line.verb("by hand", "steer", _steer, text)
    study_names(parser.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)"))
    parser.add_argument("--port", type=int, default=0, help="to listen at (default: a free one)")


def _trials(parser: Parser, *, several: bool = True) -> None:
    text = "a trial's key, or how it begins"
    parser.add_argument("trial", nargs="+" if several else None, metavar="KEY", help=text)


def _register_miniature(line: CommandLine) -> None:
    text = "write its pictures and annotations, in the official formats"
    parser = line.verb("miniature", "world", _world, text)
    parser.add_argument("folder")
    parser.add_argument("--world", type=int, default=1, help=WORLDS_HELP)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train-images", type=int, default=2500)
    parser.add_argument("--num-val-images", type=int, default=2500)
    parser.add_argument("--difficulty", type=float, help="default: 0.2, of world 2 0.6")
    parser.add_argument("--picture", metavar="FILE", help="also draw the first pictures with their texts, as PNG")

    parser = line.verb("miniature", "pretrain", _pretrain, "make one of its backbones from nothing")
    parser.add_argument("backbone")
    parser.add_argument("--out", required=True)
    parser.add_argument("--world", type=int, default=1, help=WORLDS_HELP)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="small", help="small, or large: 17 million parameters, for a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="another number than the usual one rounds sums otherwise")


def _workspace(args: argparse.Namespace) -> None:
    """Make the folder, or bring it up to date."""
    from pipeline.workspace import make_workspace

    make_workspace(Path(args.folder), profile=args.profile, data=Path(args.data) if args.data else None)


def _gc(args: argparse.Namespace) -> Answer:
    """Show or remove it in the current folder."""
    from pipeline.config.load import load

    return Fields(asdict(collect(load(), Path.cwd(), remove=args.yes)))


def _stop(args: argparse.Namespace) -> Rows:
    """Write it down; a sweep that runs hears of it before the next epoch."""
    from pipeline.sweep import recorded

    store = _store()
    keys = [recorded.full_key(store, begun) for begun in args.trial]
    return _told([recorded.stop(store, key, args.after) for key in keys])


def _resume(args: argparse.Namespace) -> Rows:
    """Write it down; they go on behind the sweep that runs, or in the next one."""
    from pipeline.sweep import recorded

    store = _store()
    keys = [recorded.full_key(store, begun) for begun in args.trial]
    return _told([recorded.resume(store, key) for key in keys])


def _clone(args: argparse.Namespace) -> Rows:
    """Add the row; the sweep that runs trains it at its end, or `hificl study by-hand` does."""
    from pipeline.config.load import load
    from pipeline.core.plain_yaml import read
    from pipeline.sweep import recorded

    grid = recorded.grid_of(_named(args.grid, "--grid", "learning_rate=0.01,0.02"), "--grid")
    grid |= {name: [read(value, f"--set {name}")] for name, value in _named(args.set, "--set", "rank=8").items()}
    if not grid:
        raise InputError("nothing is to be changed", where="hificl clone", way_out="Give --set rank=8, or --grid")
    return _told(recorded.clones(Path.cwd(), load(), recorded.full_key(_store(), args.trial), grid))


def _named(given: list[str], option: str, example: str) -> dict[str, str]:
    """Return what stands behind each name."""
    texts = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"'{text}' is not of the form name=value", where=option, way_out=f"{option} {example}")
        texts[name] = value
    return texts


def _extend(args: argparse.Namespace) -> Rows:
    """Add the row, as `_clone` does."""
    from pipeline.config.load import load
    from pipeline.sweep import recorded

    key = recorded.full_key(_store(), args.trial)
    return _told([recorded.extend(Path.cwd(), load(), key, args.epochs)])


def _acts(args: argparse.Namespace) -> Rows:
    """Read the current folder's ledger."""
    return _told(_store().acts())


def _steer(args: argparse.Namespace) -> None:
    """Serve the page of the current folder's trials until Ctrl-C."""
    from pipeline.config.load import load
    from pipeline.sweep.steering import steer

    params = load()
    steer(params, args.study or params.run.studies, Path.cwd(), args.port)


def _store() -> TrialStore:
    from pipeline.plan.plan import places
    from pipeline.records.store import TrialStore

    return TrialStore(places().runs)


def _told(acts: list[Act]) -> Rows:
    rows = [act.model_dump(exclude={"schema", "check"}) | {"told": act.told} for act in acts]
    for row in rows:
        row["at"] = datetime.fromtimestamp(row["time"], UTC).isoformat(" ", "seconds")
    return Rows(rows, {"trial": "trial", "told": "by hand", "at": "at"})


@dataclass(frozen=True)
class Unreferred:
    """What no report refers to: folders, files, runs and models, and the bytes of the first two.

    Attributes:
        kept_trials: how many trials stay.
        removed: whether it is gone now.
    """

    trials: list[str]
    evaluations: list[str]
    mlflow_runs: list[str]
    models: list[str]
    bytes: int
    kept_trials: int
    removed: bool


def collect(params: Params, root: Path, *, remove: bool) -> Unreferred:
    """Return the trials, evaluations and MLflow runs that no study's evaluation refers to; remove them if asked.

    What the profile's studies plan is kept also where it is not evaluated yet, as are the candidates of a search.

    Args:
        params: the project's.
        root: the project's folder.
        remove: whether to remove what was found. MLflow runs go to MLflow's own bin (`mlflow gc` empties it);
            registered models of trials that go are taken out of the registry.

    Raises:
        InputError: nothing was evaluated, so that nothing is referred to; or a sweep holds the store.
    """
    from pipeline.records.evaluation import Evaluations
    from pipeline.records.store import TrialStore
    from pipeline.tracking.client import Tracker
    from pipeline.tracking.registry import ModelRegistry

    kept = Evaluations(root / "evaluations")
    if not kept.studies():
        raise InputError(
            "no study was evaluated, so nothing says what is referred to",
            where=str(root / "evaluations/studies"), way_out="Run dvc repro first",
        )  # fmt: skip
    store = TrialStore(root / "runs")
    with store.lock("hificl gc"):
        trials, evaluations = _referred(kept)
        trials |= _planned(params, root)
        old_trials = [store.folder(key) for key in store.all_keys() if key not in trials]
        every = sorted([*(root / "evaluations").glob("*.json"), *(root / "evaluations/measures").glob("*.json")])
        old_files = [file for file in every if str(file.relative_to(root)) not in evaluations]
        tracker = Tracker(params.tracking.uri, root)
        registry = ModelRegistry(tracker)
        gone = {folder.name for folder in old_trials}
        runs = sorted(run.run_id for every in tracker.runs_of(gone).values() for run in every)
        models = registry.models_of(gone)
        unreferred = Unreferred(
            trials=[str(folder.relative_to(root)) for folder in old_trials],
            evaluations=[str(file.relative_to(root)) for file in old_files],
            mlflow_runs=runs, models=[f"{name}/{version}" for name, version in models],
            bytes=sum(_size(path) for path in (*old_trials, *old_files)),
            kept_trials=len(trials), removed=remove,
        )  # fmt: skip
        if remove:
            store.check_held()
            registry.delete(models)
            tracker.delete_runs(runs)
            for folder in old_trials:
                shutil.rmtree(folder)
            for file in old_files:
                file.unlink()
    return unreferred


def _referred(evaluations: Evaluations) -> tuple[set[str], set[str]]:
    """Return the trials and the files that the studies' cells name."""
    cells = [cell for name in evaluations.studies() for cell in evaluations.study(name).cells]
    trials = {cell.trial for cell in cells} | {row.trial for cell in cells for row in cell.candidates}
    files = {f"evaluations/{cell.evaluation}.json" for cell in cells} | {cell.measurement for cell in cells}
    return {key for key in trials if key is not None}, {file for file in files if file is not None}


def _planned(params: Params, root: Path) -> set[str]:
    from pipeline.plan.plan import all_cells, make_plan, places
    from pipeline.records.store import TrialStore
    from pipeline.sweep.train import BY_HAND

    folders = places(root)
    try:
        cells = all_cells(params, [*params.run.studies, *({BY_HAND} & params.studies.keys())], folders)
        return set(make_plan(params, cells, folders, TrialStore(folders.runs).objective).trials)
    except HificlError as error:
        # what is planned cannot be told, so nothing may be taken away
        raise InputError(f"the profile's studies cannot be laid out: {error}", where="hificl gc") from error


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _world(args: argparse.Namespace) -> Any:
    """Write the world and return what was written."""
    from pipeline.miniature.world import write_world

    written = write_world(
        Path(args.folder), number=args.world, seed=args.seed, num_train_images=args.num_train_images,
        num_val_images=args.num_val_images, difficulty=args.difficulty,
    )  # fmt: skip
    if args.picture:
        from pipeline.report.miniature import draw_world

        draw_world(Path(args.folder), Path(args.picture))
    return written


def _pretrain(args: argparse.Namespace) -> None:
    """Pretrain a backbone and draw how it learned."""
    from pipeline.core.progress import bar
    from pipeline.miniature import pretrain as training
    from pipeline.report.miniature import draw_emergence
    from pipeline.tracking.provenance import head_commit

    with bar(f"pretrain {args.backbone}") as progress:
        training.pretrain(
            args.backbone, Path(args.out), world=args.world, seed=args.seed, size=args.size, device=args.device,
            commit=head_commit(), progress=progress, num_threads=args.threads,
        )  # fmt: skip
    draw_emergence(Path(args.out), Path(args.out) / "pretraining.svg")
