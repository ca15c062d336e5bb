"""`hificl reproduce`: a run's own record, trained and evaluated again, and the two numbers side by side."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import backbones
from pipeline.config.load import Params
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import Json
from pipeline.core.progress import say
from pipeline.data.manifest import Manifest
from pipeline.lineage.rerun import Again, check_code, checked_out, rerun
from pipeline.lineage.run_record import RunRecord, read_record
from pipeline.records.evaluation import Evaluation
from pipeline.records.trial import Machine
from pipeline.tracking.client import Tracker
from pipeline.tracking.provenance import checkout_state, code_root, this_machine, versions
from pipeline.tracking.records import text_of

# what a score may differ by where sums come in another order: on a GPU, over ranks, in a pack, on another processor
TOLERANCES = {"percent": 1.0, "fraction": 0.02}
_MEASURED = ("seconds", "memory_bytes")  # metrics that end so are measurements of the machine


@dataclass(frozen=True)
class Pair:
    """A number as it was recorded, and as it came out again; text where it is none (`nan`)."""

    recorded: float | str
    again: float | str
    difference: float


@dataclass(frozen=True)
class AdapterPair:
    """The digests of both adapters."""

    recorded: str
    again: str | None
    same: bool


@dataclass(frozen=True)
class Predictions:
    """How many answers there are, and how many of them differ."""

    samples: int
    differ: int


@dataclass(frozen=True)
class CodePair:
    """The commits of both times."""

    recorded: str | None
    ran: str | None


@dataclass(frozen=True)
class Environment:
    """What else is not as it was.

    Attributes:
        notes: in sentences.
        versions_differ: by package: the version then and now.
        recorded_machine: on which the run was made.
    """

    notes: list[str]
    versions_differ: dict[str, list[str | None]]
    recorded_machine: Machine


@dataclass(frozen=True)
class Reproduction:
    """A run beside itself, made again.

    Attributes:
        metric: what `number` is; `unit` None: the training's objective.
        number: what the run is known by; None where neither time gave one.
        others: the further metrics, by name.
        largest_difference: of all of them.
        tolerance: what may differ by.
        reproduced: whether no more does.
        adapter: None for a method without training.
        predictions: None where one of the two was not scored.
    """

    run_id: str
    trial: str
    metric: str
    unit: str | None
    number: Pair | None
    others: dict[str, Pair]
    largest_difference: float
    tolerance: float
    reproduced: bool
    adapter: AdapterPair | None
    predictions: Predictions | None
    code: CodePair
    environment: Environment

    def record(self) -> Json:
        """Return the fields as JSON has them."""
        environment = asdict(self.environment) | {"recorded_machine": self.environment.recorded_machine.model_dump()}
        return asdict(self) | {"environment": environment}

    @property
    def problem(self) -> str | None:
        """That it differs by more than the tolerance."""
        gap, allowed = self.largest_difference, self.tolerance
        return None if self.reproduced else f"{self.run_id} differs by {gap:g}, the tolerance is {allowed:g}"


def reproduce_run(
    run_id: str, params: Params, root: Path, *, tolerance: float | None = None, here: bool = False,
    keep: Path | None = None,
) -> Reproduction:  # fmt: skip
    """Train and evaluate a run again by its own record, in a private store, and compare.

    Args:
        run_id: an MLflow run of a finished trial.
        params: the project's: where weights lie, and which tracking store.
        root: the project's folder.
        tolerance: what the numbers may differ by; None: 0 for a run in one process on this CPU, or on this kind of
            card with `train.deterministic`, else `TOLERANCES`.
        here: run the code as it is now instead of the run's commit.
        keep: keep the private store in this folder.

    Raises:
        InputError: said before any work: data, weights or code are not what the run recorded.
        WorkError: the second run failed.
    """
    tracker = Tracker(params.tracking.uri, root)
    record = read_record(tracker, run_id)
    parents = _parents(tracker, record)
    manifest = _same_data(record, root)
    _same_weights(record, params)
    repository = code_root(root)
    if not here:
        check_code(repository, record.provenance, run_id)
    allowed = _tolerance(record) if tolerance is None else tolerance
    environment = _environment(record, repository, here)
    for note in environment.notes:
        say(note)
    say(f"training {record.config['method']} on {record.task} again, seed {record.config['seed']}")
    with _folder(keep) as private:
        if here:
            again = rerun(record, params, manifest, repository, private / "store", parents)
        else:
            with checked_out(repository, record.provenance, private / "code") as code:
                again = rerun(record, params, manifest, code, private / "store", parents)
    return _compared(record, again, allowed, environment)


def _parents(tracker: Tracker, record: RunRecord) -> list[Json]:
    """Return the configurations of the trials that a trial goes on from, the first one first."""
    parents: list[Json] = []
    while parent := record.config.get("parent"):
        run_id = tracker.find_run(str(parent))
        if run_id is None:
            raise InputError(f"goes on from trial {parent}, which has no run", where=record.run_id)
        record = read_record(tracker, run_id)
        parents.insert(0, record.config)
    return parents


def _same_data(record: RunRecord, root: Path) -> Manifest:
    path = root / "data/manifests" / record.task / "manifest.json"
    manifest = Manifest.load(path)
    way_out = "Put the old params of stage subsample and the old files back and draw again"
    manifest.check_digest(str(record.config["manifest_digest"]), where=path, way_out=way_out)
    manifest.verify_images()
    return manifest


def _same_weights(record: RunRecord, params: Params) -> None:
    name, wanted = record.backbone, str(record.config["backbone_digest"])
    present = backbones.digest_of(name, params.backbone_source(name))
    if present != wanted:
        raise InputError(
            f"the weights changed: digest {present[:12]}, the run was made with {wanted[:12]}",
            where=f"backbones.{name}", way_out="Put the old weights back",
        )  # fmt: skip


def _tolerance(record: RunRecord) -> float:
    # runs of before `exact` was kept say with how many trials they shared a pass, earlier ones with how many they might
    packed = record.tags.get("packed") or record.tags.get("pack", "1")
    own_sums = record.config.get("world_size", 1) == 1 and record.tags.get("exact", text_of(packed == "1")) == text_of(
        True
    )
    gpus = record.provenance.machine.gpus
    same_card = bool(record.config.get("deterministic")) and gpus == this_machine().gpus
    solo = own_sums and (same_card if gpus else _other_processor(record) is None)
    unit = record.evaluation.unit if record.evaluation else "percent"
    return 0.0 if solo else TOLERANCES.get(unit, TOLERANCES["percent"])


def _other_processor(record: RunRecord) -> str | None:
    """Return the processor that a run was made on, where it is not this machine's."""
    recorded = record.provenance.machine.cpu
    return recorded if recorded not in (None, this_machine().cpu) else None


def _environment(record: RunRecord, repository: Path, here: bool) -> Environment:
    origin = record.provenance
    notes = []
    if here:
        now = checkout_state(repository)
        notes.append(f"running the code as it is now ({now.commit or now.note}), not the run's own")
        if now.dirty:
            notes.append(f"this tree is dirty: {', '.join(now.changed[:5])}")
    elif origin.dirty:
        lines = origin.diff.count("\n")
        notes.append(f"the run was made from a dirty tree: its own diff of {lines} lines is laid over the commit")
    earlier = record.tags.get("git.earlier_commits")
    if earlier:
        notes.append(f"the run was begun by other code ({earlier}) and resumed")
    present, before = versions(), origin.versions
    differ = {name: [before[name], present.get(name)] for name in before if before[name] != present.get(name)}
    if differ:
        pairs = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in differ.items())
        notes.append(f"other versions than the run's: {pairs}")
    processor = _other_processor(record)
    if processor is not None:
        notes.append(f"another processor than the run's, {processor}: it sums in another order")
    return Environment(notes, differ, origin.machine)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        if keep.exists() and any(keep.iterdir()):
            raise InputError("the folder is not empty", where=str(keep), way_out="Give --keep another folder")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    private = Path(tempfile.mkdtemp(prefix="hificl-reproduce-"))
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _compared(record: RunRecord, again: Again, allowed: float, environment: Environment) -> Reproduction:
    first, second = record.metrics, again.metrics
    shared = sorted(name for name in first if name in second and not name.endswith(_MEASURED) and "/" not in name)
    others = {name: _pair(first[name], second[name]) for name in shared}
    if record.evaluation and again.evaluation:
        number: Pair | None = _pair(_value(record.evaluation), _value(again.evaluation))
        metric, unit = record.evaluation.metric, record.evaluation.unit
    else:
        metric, unit, number = "objective", None, others.get("objective")
    worst = max([abs(pair.difference) for pair in (*others.values(), *([number] if number else []))], default=0.0)
    gap = abs(number.difference) if number else worst
    return Reproduction(
        run_id=record.run_id, trial=record.key, metric=metric, unit=unit, number=number,
        others=others, largest_difference=worst, tolerance=allowed,
        # without a tolerance everything has to be equal, losses too; with one the number is what it is about
        reproduced=worst == 0.0 if allowed == 0.0 else gap <= allowed,
        adapter=_adapters(record, again), predictions=_predictions(record, again),
        code=CodePair(record.provenance.commit, again.commit), environment=environment,
    )  # fmt: skip


def _value(evaluation: Evaluation) -> float:
    return math.nan if evaluation.value is None else evaluation.value


def _pair(recorded: float, again: float) -> Pair:
    first, second = (value if math.isfinite(value) else str(value) for value in (recorded, again))
    # no number twice (a norm that an engine does not give) is no difference; once, it is one without bound
    finite = math.isfinite(recorded) and math.isfinite(again)
    gap = again - recorded if finite else 0.0 if first == second else math.inf
    return Pair(first, second, gap)


def _adapters(record: RunRecord, again: Again) -> AdapterPair | None:
    recorded = record.tags.get("adapter_digest")
    if recorded is None:
        return None
    return AdapterPair(recorded, again.adapter_digest, recorded == again.adapter_digest)


def _predictions(record: RunRecord, again: Again) -> Predictions | None:
    if not (record.evaluation and again.evaluation):
        return None
    first, second = (
        {str(answer.sample_id): answer.prediction for answer in evaluation.predictions}
        for evaluation in (record.evaluation, again.evaluation)
    )
    return Predictions(len(first), sum(second.get(name) != text for name, text in first.items()))
