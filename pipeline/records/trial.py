"""A trial's own records: what it was made from, each epoch, how it ended, and where its number comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import validate
from pipeline.records import Count, Flag, Frozen, Json, Number, Record

FINAL = ("finished", "diverged")  # ends that training again would only repeat
AGAIN = "Remove the trial's folder to train it again"


class TrialEnd(Record):
    """How a trial ended: done.json. What is not known, such as the cost of a trial that failed, is None.

    Attributes:
        status: how.
        error: why it diverged or failed, or left its search.
        epochs: how many it has behind it.
        chosen_epoch: whose adapter is kept.
        objective: of that epoch.
        train_seconds: of training; `seconds` with scoring, `keeping_seconds` of checkpoints and the ledger.
        packed: most trials, this one included, that it has shared a forward pass with.
        exact: whether all its sums were those that it has alone; None: of before that was kept.
        train_flops: by formula.
        adapter_digest: of the adapter's folder.
        metrics_digest: of metrics.jsonl, and `losses_digest` of losses.jsonl, where the trial ended by itself.
        attempts: after how many it was given up.
    """

    schema_number: ClassVar[int] = 3  # 2: without `exact`
    sealed: ClassVar[bool] = True

    status: Status
    error: str | None = None
    epochs: Count | None = None
    chosen_epoch: Count | None = None
    objective: Number | None = None
    trainable_parameters: Count | None = None
    train_seconds: Number | None = None
    seconds: Number | None = None
    keeping_seconds: Number | None = None
    packed: Count | None = None
    exact: Flag | None = None
    peak_memory_bytes: Count | None = None
    train_flops: Number | None = None
    adapter_digest: str | None = None
    metrics_digest: str | None = None
    losses_digest: str | None = None
    attempts: Count | None = None

    @property
    def final(self) -> bool:
        """Whether training again would only repeat it."""
        return self.status in FINAL


class Machine(Frozen):
    """The machine that a number was made on; no host name, so that it can be published."""

    system: str | None = None
    cpu: str | None = None
    cores: Count | None = None
    memory_gib: Number | None = None
    gpus: tuple[str, ...] = ()


class DataDigests(Frozen):
    """The md5 of the parameters' files, and of every output that dvc.lock knows."""

    params: str | None = None
    outs: dict[str, str] = {}


class Provenance(Record):
    """What has to be the same for a number to come out again; nothing is known of a trial that a slot took up alone.

    Attributes:
        commit: None outside git.
        dirty: whether the tree differed from it; None outside git.
        changed: the paths that did.
        left_out: those of them that the diff does not hold, because they are too big to be source, no source to git, or
            hold a secret.
        diff: against the commit.
        note: why there is no commit.
        versions: of Python and of the packages that a number depends on.
    """

    commit: str | None = None
    dirty: Flag | None = None
    changed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    diff: str = ""
    note: str | None = None
    versions: dict[str, str | None] = {}
    machine: Machine = Machine()
    data: DataDigests = DataDigests()

    @property
    def known(self) -> bool:
        """Whether anything is."""
        return self != Provenance()


class TrialRecord(Record):
    """What a trial was started with: config.json.

    Attributes:
        config: as the code of its time wrote it, whose hash is the key also under newer code.
        provenance: where it was started, or last resumed after the code had moved on.
        earlier_commits: the commits that began it, in that case.
    """

    config: Json
    provenance: Provenance = Provenance()
    earlier_commits: tuple[str | None, ...] = ()

    def trial(self, where: str) -> TrialConfig:
        """Return the configuration.

        Raises:
            InputError: this code does not know it; the message names the field.
        """
        return validate(TrialConfig, self.config, where, noun="field", way_out=AGAIN)

    def resumed(self, later: Self) -> Self:
        """Return the record of a trial that other code goes on with."""
        return later.model_copy(update={"earlier_commits": (*self.earlier_commits, self.provenance.commit)})


class Best(Frozen):
    """The best epoch so far.

    Attributes:
        adapter_digest: of the adapter's folder; None: of before it was kept.
    """

    epoch: Count
    objective: Number
    adapter_digest: str | None = None


class CheckpointState(Record):
    """What a checkpoint holds beside the engine's files: state.json.

    Attributes:
        epoch: how many are behind it.
        rows: their metrics.
        best: the best of them.
        packed: see `TrialEnd`, also of `exact`.
        keeping: seconds spent on checkpoints and the ledger.
        peak: bytes of memory.
        files: the digests of the other files, by path.
    """

    schema_number: ClassVar[int] = 3
    sealed: ClassVar[bool] = True

    epoch: Count
    rows: tuple[EpochReport, ...] = ()
    best: Best | None = None
    packed: Count = 1
    exact: Flag = True
    keeping: Number = 0.0
    peak: Count = 0
    files: dict[str, str] = {}

    upgrades: ClassVar = {
        0: lambda fields: {**fields, "best": fields.get("best") or None},
        2: lambda fields: {**fields, "exact": fields.get("packed", 1) == 1},
    }

    def end(self, status: Status, **known: Any) -> TrialEnd:
        """Return the end of a trial in this state: what it took, and what else is `known` of it."""
        return TrialEnd(
            status=status, epochs=self.epoch, packed=self.packed, exact=self.exact, keeping_seconds=self.keeping,
            peak_memory_bytes=self.peak or None, train_seconds=sum(row.train_seconds or 0.0 for row in self.rows),
            seconds=sum(row.seconds or 0.0 for row in self.rows), **known,
        )  # fmt: skip


class Attempts(Record):
    """How often a leased trial was tried with nothing kept in between: .leases/KEY.tried, while it is not settled.

    Attributes:
        attempts: how often; the one that runs counts.
        at: its newest checkpoint at that time.
        error: of the last one that had a word to say.
    """

    attempts: Count = 0
    at: str = ""
    error: str | None = None


class EpochSoFar(Record):
    """What an epoch has added up so far on one rank, in a checkpoint within it: so-far-rank0000.json.

    Attributes:
        steps: that are behind it.
        sums: of the losses, each step's share of the epoch's mean.
        losses: of each step, and the answers' cross-entropy alone in `ground_truth`.
        gradient_norm: of the last step, before clipping.
        learning_rate_scale: of the last step.
        seconds: of training.
    """

    schema_number: ClassVar[int] = 2  # 1: without `ground_truth`

    steps: Count
    sums: dict[str, Number]
    losses: tuple[Number, ...] = Field(strict=False)
    ground_truth: tuple[Number, ...] = Field((), strict=False)
    gradient_norm: Number
    learning_rate_scale: Number
    seconds: Number


class Act(Record):
    """What somebody did to a trial by hand: a line of runs/acts.jsonl. What does not belong to the kind of act is None.

    Attributes:
        time: in seconds since 1970.
        act: a trial is stopped, may go on, or is made from another one, its parent.
        trial: the trial's key; of a clone or an extension, the new one's.
        after: the epoch after which a trial is stopped; None: after the one in which it is, or before its first.
        parent: the key of the trial that it was made from.
        changes: what is not as in the parent, by the settings' names.
    """

    sparse: ClassVar[bool] = True
    sealed: ClassVar[bool] = True

    time: Number
    act: Literal["stop", "resume", "clone", "extend"]
    trial: str
    after: Count | None = None
    parent: str | None = None
    changes: Json | None = None

    @property
    def told(self) -> str:
        """The act in a few words."""
        changes = ", ".join(f"{name} {value}" for name, value in (self.changes or {}).items())
        match self.act:
            case "stop":
                return "stopped" if self.after is None else f"stopped after epoch {self.after}"
            case "resume":
                return "may go on"
            case "clone":
                return f"a clone of {self.parent} with {changes}"
            case "extend":
                return f"{self.parent} trained on, with {changes}"


Status = Literal["finished", "diverged", "stopped", "failed"]  # how a trial ended


class EpochReport(Record):
    """The metrics of one epoch: a line of metrics.jsonl. What was not measured is None.

    Attributes:
        epoch: its number, from 1.
        train_loss: mean over the epoch, as are its parts.
        gradient_norm: of the last step, before clipping; not a number where an engine gives none.
        learning_rate: of the last step.
        selection_score: on the selection split; `selection_loss` where the loss chooses.
        objective: what the best epoch is chosen by; higher is better.
        seconds: of training and scoring, `train_seconds` of training alone.
    """

    sparse: ClassVar[bool] = True

    epoch: Count
    train_loss: Number | None = None
    ground_truth_loss: Number | None = None
    alignment_loss: Number | None = None
    gradient_norm: Number | None = None
    learning_rate: Number | None = None
    selection_score: Number | None = None
    selection_loss: Number | None = None
    objective: Number | None = None
    seconds: Number | None = None
    train_seconds: Number | None = None

    @classmethod
    def among(cls, fields: Mapping[str, Any]) -> Self:
        """Return the report among other fields, such as those that Ray Tune adds to it."""
        return cls.model_validate({name: fields[name] for name in cls.model_fields if name in fields})

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured, by name, without the epoch's number."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "epoch"}
        return {name: value for name, value in values.items() if value is not None}


class ComparedLoss(Record):
    """A trial's loss at a point at which those of its search are compared: a line of compared.jsonl.

    Attributes:
        after: the point, in epochs.
        step: how many steps were behind the trial.
        loss: the answers' mean cross-entropy over the last tenth of an epoch; None: the trial was past the point
            before it was asked for.
    """

    sealed: ClassVar[bool] = True

    after: Number
    step: Count
    loss: Number | None = None


class StepLosses(Record):
    """The training loss of every step of one epoch: a line of losses.jsonl."""

    schema_number: ClassVar[int] = 2
    sealed: ClassVar[bool] = True

    epoch: Count
    train_loss: tuple[Number, ...] = Field(strict=False)


@dataclass(frozen=True)
class TrialReport:
    """What a slot says of a trial: an epoch that is complete, its end, what it is compared by, or several of these.

    Attributes:
        key: the trial's.
        epoch: how many epochs it has behind it; the one in which it diverged counts.
        metrics: the epoch's; None where it ended without completing one.
        end: how it ended; None while it goes on.
        error: why it failed.
        compared: its losses at points at which it is compared, where it has just come to one.
    """

    key: str
    epoch: int
    metrics: EpochReport | None = None
    end: Status | None = None
    error: str | None = None
    compared: tuple[ComparedLoss, ...] = ()


def replayed(key: str, epochs: Sequence[EpochReport], end: Status | None = None) -> list[TrialReport]:
    """Return the reports of epochs that the ledger knows, the last of which, if there is one, says the end."""
    reports = [TrialReport(key, metrics.epoch, metrics) for metrics in epochs]
    if end is None:
        return reports
    return [*reports[:-1], replace(reports[-1], end=end) if reports else TrialReport(key, 0, end=end)]
