"""One's own file and a backbone's name in; a table, a page and an adapter that answers out: `hificl adapt`.

What it does is written down as a profile and a study in a workspace of its own, so that `dvc repro` does it again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import RenderableType

import pipeline
from pipeline import backbones, methods, report
from pipeline.config.load import FOLDERS, PARAMS, BackboneSource, Params, StudyMethod, load
from pipeline.config.schema import TaskFile, Train
from pipeline.core import plain_yaml
from pipeline.core.errors import InputError, WorkError, validate
from pipeline.core.files import write_atomic
from pipeline.core.plain_yaml import Json
from pipeline.core.progress import Clock, say
from pipeline.core.terminal import Answer, table
from pipeline.data.manifest import Manifest
from pipeline.data.sample import Sample
from pipeline.plan.plan import places
from pipeline.pool.supervisor import Drivers
from pipeline.records import Count, Record, as_written
from pipeline.records.evaluation import CellResult
from pipeline.records.store import TrialStore
from pipeline.report.tables import TableEntry
from pipeline.sweep.draw import draw_task, kept_together
from pipeline.sweep.evaluate import evaluate
from pipeline.sweep.train import sweep
from pipeline.tasks import tasks
from pipeline.tasks.file_rows import completed
from pipeline.tasks.file_task import FileTask
from pipeline.workspace import BACKBONES, LINKS, draw_samples, lay_out, report_on, stages_of

PLAN = "adapt.json"  # a `LaidOut`
_TIMING, _TIMED, _TIMED_SCORED = "timing", 16, 8  # a study that only tells seconds; samples that it trains on, scores
_SHOTS = 4
_RATES = (1.0, 3.0, 10.0, 0.3)  # times a method's own learning rate: the points of its search, in this order
# Points of the search and epochs, from what a long budget pays for to what the shortest does.
_EFFORTS = ((4, 10), (4, 5), (3, 5), (2, 5), (2, 3), (1, 3), (1, 2), (1, 1))
_MOST = {"train": 1000, "selection": 100, "evaluation": 1000}  # samples, in the order of `Budget`
_LEAST_TRAINED, _LEAST_CHOSEN, _LEAST_SCORED = 16, 8, 20
_LABELS = {"hificl": "HiFICL", "lora": "LoRA", "mimic": "MimIC", "live": "LIVE"}
_AT_LEAST = 0.4  # of the minutes, however long starting took: that is no reason to train next to nothing
_TO_TRAIN, _TO_SCORE = 0.6, 0.25  # of the minutes: training with its scores, final scores; the rest is starting


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, paths absolute."""

    data: str
    backbone: str
    methods: tuple[str, ...]
    minutes: float
    seed: int
    settings: Mapping[str, object]


@dataclass(frozen=True)
class Seconds:
    """What was measured: seconds a training sample of each method takes, and one that is scored."""

    train: Mapping[str, float]
    score: float


@dataclass(frozen=True)
class Budget:
    """What the minutes pay for, each method the same.

    Attributes:
        points: of the search over learning rates.
        epochs: of every point.
        train: samples to train on.
        selection: samples to choose epoch and rate by.
        evaluation: samples that are reported on.
    """

    points: Count
    epochs: Count
    train: Count
    selection: Count
    evaluation: Count

    def words(self) -> str:
        """Return what each method gets."""
        searched = f"{self.points} learning rates, each with" if self.points > 1 else "one learning rate,"
        return f"{searched} {self.train} samples for {self.epochs} epoch{'' if self.epochs == 1 else 's'}"


class LaidOut(Record):
    """What was asked for and what it came to, so that the same command goes on: adapt.json beside params.yaml."""

    asked: Json
    guessed: tuple[str, ...] = ()
    budget: Budget


def budget(seconds: Seconds, left: float, rows: Mapping[str, int], slots: int, baselines: int) -> Budget:
    """Return what can be done in the seconds that are left.

    Args:
        seconds: what was measured.
        left: seconds, by the clock.
        rows: of each split at most.
        slots: trainings side by side.
        baselines: rows of the table that are only scored.
    """
    numbers = len(seconds.train) + baselines
    scored = int(_TO_SCORE * left * slots / (numbers * seconds.score))
    evaluation = min(rows["evaluation"], max(_LEAST_SCORED, min(scored, _MOST["evaluation"])))
    most, chosen = min(rows["train"], _MOST["train"]), min(rows["selection"], _MOST["selection"])

    def takes(points: int, epochs: int, train: int, selection: int) -> float:
        of_epoch = sum(train * each + selection * seconds.score for each in seconds.train.values())
        return points * epochs * of_epoch / slots

    for points, epochs in _EFFORTS:
        for selection in (chosen, max(1, chosen // 4)):
            if takes(points, epochs, most, selection) <= _TO_TRAIN * left:
                return Budget(points, epochs, most, selection, evaluation)
    few = min(chosen, _LEAST_CHOSEN)
    affordable = (_TO_TRAIN * left * slots / len(seconds.train) - few * seconds.score) / max(seconds.train.values())
    return Budget(1, 1, min(most, max(_LEAST_TRAINED, int(affordable))), few, evaluation)


@dataclass(frozen=True)
class AdaptedRow:
    """One method: its score with the 95 % interval over samples; its adapter, where it trains one."""

    method: str
    metric: str
    value: float | None
    interval: tuple[float, float] | None
    unit: str
    learning_rate: float | None
    adapter: str | None


@dataclass(frozen=True)
class Adapted(Answer):
    """What came out: the table, the best adapter by the selection split, and a line that asks it."""

    rows: tuple[AdaptedRow, ...]
    best: str | None
    adapter: str | None
    page: str
    workspace: str
    ask: str | None
    failed: str | None = None

    def record(self) -> Json:
        """Return all of it."""
        record: Json = asdict(self)
        return record

    def shown(self) -> Iterator[RenderableType]:
        """Give the table, where everything lies, and the line."""
        made = table("method", "score", "95 % interval", "rate", right=("score", "95 % interval", "rate"))
        for row in self.rows:
            digits = 1 if row.unit == "percent" else 3
            span = "-" if row.interval is None else " to ".join(f"{end:.{digits}f}" for end in row.interval)
            value = "-" if row.value is None else f"{row.value:.{digits}f}{'*' if row.method == self.best else ' '}"
            made.add_row(row.method, value, span, "-" if row.learning_rate is None else f"{row.learning_rate:g}")
        yield made
        yield f"\n{self.rows[0].metric}, {self.rows[0].unit}; * chosen on the selection split"
        yield f"page       {self.page}\nadapter    {self.adapter or 'none'}"
        yield f"again      cd {shlex.quote(self.workspace)} && dvc repro"
        if self.ask:
            yield f"ask it     {self.ask}"

    @property
    def problem(self) -> str | None:
        """What could not be done."""
        return self.failed


def adapt(asked: Asked, out: Path) -> Adapted:
    """Draw, search, train and score in the workspace `out`; what is done there already is not done again.

    Raises:
        InputError: the data, the backbone or a method do not fit, or `out` has something else.
        WorkError: nothing could be trained.
    """
    root = _project()
    load(root / PARAMS)  # whose own tasks and backbones have names too
    sees = backbones.reads_images(asked.backbone)
    for method in asked.methods:
        if not methods.is_trained(method):
            raise InputError(
                f"'{method}' trains nothing", where="--methods", way_out="Zero- and few-shot rows are added"
            )
    if not asked.methods or asked.minutes <= 0:
        problem = "names no method" if asked.minutes > 0 else f"is {asked.minutes:g}"
        raise InputError(problem, where="--methods" if asked.minutes > 0 else "--minutes", way_out="Give one at least")
    name = task_name(Path(asked.data))
    kept = _kept(out, asked)
    clock = Clock(4 if kept is None else 3, asked.minutes if kept is None else None)
    task, data_root = _task(name, asked)
    rows = _rows(task, data_root)
    if "{image}" in (task.settings.prompt or "") and not sees:
        way_out = "Give a backbone that reads pictures; `hificl backbones` lists the classes"
        raise InputError("reads text alone, and the rows have pictures", where=asked.backbone, way_out=way_out)
    for line in task.guessed if kept is None else ():
        say(f"guessed: {line}")
    drawn = Budget(1, 1, *(min(rows[split], most) for split, most in _MOST.items()))
    # of a small pool the evaluation gets what the others leave, which only the draw knows
    to_the_last = task.one_pool and rows["evaluation"] <= 2 * drawn.evaluation
    work = _Workspace(out.resolve(), root, name, asked, task, data_root, drawn, to_the_last, clock)
    if kept is None:
        work.make(drawn)
    work.draw()
    with Drivers() as drivers:
        if kept is None:
            given = work.measure(rows, drivers)
            work.make(given)
            record = LaidOut(asked=as_written(asdict(asked)), guessed=tuple(task.guessed), budget=given)
            write_atomic(out / PLAN, record.text() + "\n")
        return work.run(drivers)


def _project() -> Path:
    """Return the folder of the project: this one, or else the one that this code lies in."""
    places = (Path.cwd(), Path(pipeline.__path__[0]).parent)
    for place in places:
        if (place / "dvc.yaml").is_file() and (place / "stages").is_dir():
            return place.resolve()
    raise InputError("no project here", where=str(places[0]), way_out="Run it in a checkout of the project")


def task_name(data: Path) -> str:
    """Return what a task over the file is called: a name that no other task has."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", data.stem).strip("-.") or "data"
    return f"own-{plain}" if plain in tasks or not plain[0].isalnum() else plain


def _kept(out: Path, asked: Asked) -> Budget | None:
    """Return what an earlier call laid out in the same workspace, or None where there is none."""
    path = out / PLAN
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()) and not (out / ".dvc").is_dir():
            raise InputError("is a folder with other things in it", where=str(out), way_out="Give another --out")
        return None
    record = LaidOut.read(path, "Give another --out, or remove it")
    changed = [key for key, value in as_written(asdict(asked)).items() if record.asked.get(key) != value]
    if changed:
        raise InputError(
            f"was made with another {', '.join(changed)}", where=str(path), way_out="Give another --out, or remove it"
        )
    return record.budget


def _task(name: str, asked: Asked) -> tuple[FileTask, Path]:
    """Return the task, all of it said, and the folder that its paths are below."""
    data, settings = Path(asked.data), dict(asked.settings)
    if not data.exists():
        raise InputError("no such file or folder", where=asked.data, way_out="Give the file of your samples as --data")
    below = [str(data.parent), *([str(settings["images"])] if "images" in settings else [])]
    root = Path(os.path.commonpath(below))
    if "images" in settings:
        settings["images"] = os.path.relpath(str(settings["images"]), root)
    given = validate(TaskFile, {"file": os.path.relpath(data, root), **settings}, "the task")
    return FileTask.of(name, completed(name, given, root)), root


def _rows(task: FileTask, root: Path) -> dict[str, int]:
    """Return how many samples each split has at most; of a pool that is drawn from, four in ten are reported on.

    A tenth is left for rows that cannot be taken, because another split has their picture.
    """
    pools = {split: list(task.index(root, split)) for split in task.pools(root)}
    taken = {thing for entry in pools["evaluation"] for thing in kept_together(entry)} if "train" in pools else set()
    free = {
        split: sum(not any(thing in taken for thing in kept_together(entry)) for entry in entries)
        for split, entries in pools.items()
        if split != "evaluation" or not taken
    }
    if "train" not in pools:
        whole = free["evaluation"]
        counts = {"train": whole // 2, "selection": max(1, whole // 10), "evaluation": int(whole * 0.4)}
    else:
        whole = free["train"]
        selection = int(0.9 * free["selection"]) if "selection" in pools else max(1, whole // 7)
        train = int(0.9 * (whole if "selection" in pools else whole - selection))
        counts = {"train": train, "selection": selection, "evaluation": len(pools["evaluation"])}
    if counts["train"] < _LEAST_TRAINED or not (counts["selection"] and counts["evaluation"]):
        shown = ", ".join(f"{size} for {split}" for split, size in counts.items())
        raise InputError(
            f"{whole} usable rows are too few ({shown})", where=str(root / task.settings.file),
            way_out=f"{_LEAST_TRAINED} to train on are the least; where a picture is in two splits, training loses it",
        )  # fmt: skip
    return counts


@dataclass(frozen=True)
class _Workspace:
    """The folder that everything is done in."""

    folder: Path
    root: Path
    name: str
    asked: Asked
    task: FileTask
    data_root: Path
    drawn: Budget
    to_the_last: bool
    clock: Clock

    def make(self, given: Budget) -> None:
        """Write profile, study and stages, and link the code."""
        steps = stages_of(self.root, gone={*BACKBONES, "world", "official"}, absent={"data/real", "data/miniature"})
        subsample = steps["stages"]["subsample"]  # type: ignore[index,call-overload]
        subsample["deps"] += self._watched()  # type: ignore[index,call-overload,operator]
        lay_out(self.folder, self.root, self.name, steps)
        written = {"profiles": self._profile(given), "studies": self._study(given)}
        for kind, content in written.items():
            (self.folder / FOLDERS[kind]).mkdir(exist_ok=True)
            write_atomic(self.folder / FOLDERS[kind] / f"{self.name}.yaml", plain_yaml.write(content))

    def _watched(self) -> list[str]:
        """Return what DVC is to see: the data's own file, and the folders that hold its pictures."""
        settings, places = self.task.settings, set[str]()
        for split in self.task.pools(self.data_root):
            for entry in self.task.index(self.data_root, split):
                for image in entry.images:
                    below, _, rest = image.partition("#")[0].partition("/")  # one level down, so that there are few
                    places.add(settings.images or (below if rest else ""))
        files = {self.data_root / place for place in (settings.file, *places)}
        files = {file for file in files if not self.folder.is_relative_to(file)}  # of itself a stage cannot be made
        return sorted(str(file) for file in files if not any(parent in file.parents for parent in files))

    def _profile(self, given: Budget) -> Json:
        gpu = torch.cuda.is_available()
        source = self._source()
        if gpu:
            source.setdefault("dtype", "bf16")
        settings = self.task.settings.model_dump(mode="json", exclude_none=True)
        profile: Json = {
            "backbones": [self.asked.backbone], "tasks": {self.name: settings}, "studies": [self.name],
            "data_root": str(self.data_root), **({"sources": {self.asked.backbone: source}} if source else {}),
            "stand_ins": {self.asked.backbone: [self.asked.backbone]},
            "subsample": {
                "seed": self.asked.seed, "num_train": self.drawn.train, "num_selection": self.drawn.selection,
                "num_evaluation": "whole" if self.to_the_last else self.drawn.evaluation,
            },
            "train": {
                "num_train_samples": given.train, "num_selection_samples": given.selection, "epochs": given.epochs,
                "num_shots": _SHOTS, "micro_batch_size": 8, "accumulation": 1, "precision": "bf16" if gpu else "fp32",
            },
            **({"sweep": {"gpus_per_worker": 1}} if gpu else {}),
            "evaluate": {"num_evaluation_samples": given.evaluation, "generation": {"batch_size": 32}},
        }  # fmt: skip
        return profile

    def _source(self) -> Json:
        """Return where the weights lie: as params.yaml says it, or a profile that knows the backbone."""
        params, name = load(self.root / "params.yaml"), self.asked.backbone
        known = params.backbones.get(name) or BackboneSource.spelled(name)
        described = (profile.get("sources", {}).get(name) for profile in params.profiles.values())
        source: Json = dict(next(filter(None, described), {}))
        if known is not None:
            source = known.model_dump(mode="json", exclude_unset=True)
        for key in ("weights", "hub"):  # a path from the project's folder
            place = str(source.get(key) or "")
            if place and (self.root / place).exists() and Path(place).parts[0] not in LINKS:
                source[key] = str((self.root / place).resolve())
        return source

    def _study(self, given: Budget) -> Json:
        rows: Json = {
            "zero-shot": {"label": "Zero-shot"},
            f"icl-{_SHOTS}": {"method": "icl-k", "num_shots": _SHOTS, "label": f"{_SHOTS}-shot"},
        }
        for method in self.asked.methods:
            usual = methods.defaults(method).get("learning_rate", Train().learning_rate)
            rates = [float(f"{times * usual:.2g}") for times in _RATES[: given.points]]
            rows[method] = {"label": _LABELS.get(method, method), "search": {"learning_rate": rates}}  # type: ignore[dict-item]
        data = f"Data: {Path(self.asked.data).name}, scored by {self.task.settings.score}."
        return {
            "title": f"{self.name} on {self.asked.backbone}",
            "backbones": [self.asked.backbone], "tasks": [self.name], "seeds": [self.asked.seed], "methods": rows,
            "reference": "zero-shot", "note": f"{data} Each method: {given.words()}.",
        }  # fmt: skip

    def measure(self, rows: Mapping[str, int], drivers: Drivers) -> Budget:
        """Train every method on a few samples, and return what the time that is left pays for."""
        with _inside(self.folder):
            params = load()
            few = {"num_train_samples": min(_TIMED, rows["train"]), "epochs": 2}  # the first also warms up
            few["num_selection_samples"] = min(_TIMED_SCORED, rows["selection"])
            methods = {method: StudyMethod(method=method) for method in self.asked.methods}
            study = params.studies[self.name].model_copy(update={"methods": methods, "train": few})
            timing = params.model_copy(update={"studies": {_TIMING: study.model_copy(update={"title": "Timing"})}})
            with self.clock.part(f"timing {', '.join(methods)} on {few['num_train_samples']} samples"):
                sweep(timing, [_TIMING], drivers)
            store = TrialStore("runs")
            last = {store.config(key).method: store.epochs(key)[-1] for key in store.all_keys() if store.done(key)}
            slots = _slots(params)
        train = {method: (epoch.train_seconds or 0.0) / few["num_train_samples"] for method, epoch in last.items()}
        scoring = max((epoch.seconds or 0.0) - (epoch.train_seconds or 0.0) for epoch in last.values())
        seconds = Seconds(train, max(scoring / few["num_selection_samples"], 1e-4))
        whole = self.asked.minutes * 60
        left = max(_AT_LEAST * whole, whole - self.clock.spent())
        given = budget(seconds, left, rows, slots, baselines=2)
        say(
            f"{left / 60:.1f} minutes: a method gets {given.words()}; {given.selection} samples choose, "
            f"{given.evaluation} are reported on"
        )
        return given

    def draw(self) -> None:
        """Draw the samples, where that is not done.

        Raises:
            InputError: the pictures of some rows cannot be read.
        """
        with _inside(self.folder), self.clock.part("drawing samples", live=False):
            params = load()
            try:
                draw_samples(params, [self.name], Path.cwd())
            except WorkError:  # of DVC, which does not say what its stage said
                draw_task(params, self.name)
                raise

    def run(self, drivers: Drivers) -> Adapted:
        """Do what is written down, and return what came out."""
        with _inside(self.folder):
            params, problems = load(), []
            for title, work in (("training every point of the search", sweep), ("scoring and reporting", evaluate)):
                with self.clock.part(title):
                    try:
                        work(params, [self.name], drivers)
                    except WorkError as error:  # of some trials: the others are shown
                        problems.append(str(error))
            made = report.load_table(self.name, params, Path("evaluations"))
            if not any(entry.done for entry in made.entries.values()):
                raise WorkError("; ".join(problems), where=str(self.folder))
            report_on([self.name], params, Path.cwd())
            manifest = Manifest.load(places().manifest(self.name))
            cells = {entry.line.row: entry for entry in made.entries.values()}
            best = self._best([cell for entry in cells.values() for cell in entry.done])
            adapter = self.folder / "adapter"
            if best is not None:
                shutil.rmtree(adapter, ignore_errors=True)
                shutil.copytree(Path("runs") / str(best.trial) / "adapter", adapter)
            rows = tuple(self._row(row, entry) for row, entry in cells.items())
        failed = [row.method for row in rows if row.value is None]
        if failed and not set(failed) & set(self.asked.methods):
            say(f"note: {', '.join(failed)} is not there: {'; '.join(problems)}")
            problems.clear()
        ask = self._question(adapter, manifest.splits["evaluation"][0]) if best else None
        return Adapted(
            rows, best.row if best else None, str(adapter) if best else None,
            str(self.folder / "reports/index.html"), str(self.folder), ask, "; ".join(problems) or None,
        )  # fmt: skip

    def _best(self, cells: Sequence[CellResult]) -> CellResult | None:
        """Return the trained method with the best score on the selection split."""
        scored = [
            (candidate.selection_score, cell)
            for cell in cells
            for candidate in cell.candidates
            if cell.method in self.asked.methods and candidate.trial == cell.trial
            if candidate.selection_score is not None
        ]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None

    def _row(self, row: str, entry: TableEntry) -> AdaptedRow:
        cell = entry.cells[0]
        adapter = self.folder / "runs" / str(cell.trial) / "adapter"
        rate = cell.searched.get("learning_rate")
        return AdaptedRow(
            row, entry.metric, entry.value, entry.interval, entry.unit,
            float(rate) if isinstance(rate, int | float) else None, str(adapter) if adapter.is_dir() else None,
        )  # fmt: skip

    def _question(self, adapter: Path, sample: Sample) -> str:
        words = ["hificl", "predict", "--adapter", str(adapter)]
        words += ["--image", str(self.data_root / sample.images[0].path)] if sample.images else []
        words += ["--question", sample.question] if sample.question is not None else []
        return shlex.join(words)


def _slots(params: Params) -> int:
    """Return how many trainings stand side by side on this machine."""
    asked = params.sweep.slots
    return max(1, params.sweep.slots_on(os.cpu_count() or 1, torch.cuda.device_count()) if asked == "auto" else asked)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Make a folder the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
