"""A trial's own records: what it was made from, how it ended, and where its number comes from."""

from __future__ import annotations

from typing import ClassVar, Self

from pipeline.config.trial import TrialConfig
from pipeline.core.invalid import validate
from pipeline.records.base import Count, Flag, Frozen, Json, Number, Record
from pipeline.records.epoch import EpochReport, Status

FINAL = ("finished", "diverged")  # ends that training again would only repeat
AGAIN = "Remove the trial's folder to train it again"


class TrialEnd(Record):
    """How a trial ended: done.json. What is not known, such as the cost of a trial that failed, is None.

    Attributes:
        status: how.
        error: why it diverged or failed.
        epochs: how many it has behind it.
        chosen_epoch: whose adapter is kept.
        objective: of that epoch.
        train_seconds: of training; `seconds` with scoring, `keeping_seconds` of checkpoints and the ledger.
        packed: most trials, this one included, that it has shared a forward pass with.
        train_flops: by formula.
        adapter_digest: of the adapter's folder.
        attempts: after how many it was given up.
    """

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
    peak_memory_bytes: Count | None = None
    train_flops: Number | None = None
    adapter_digest: str | None = None
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
        left_out: those of them that the diff does not hold, because they are too big to be source.
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
    """The best epoch so far."""

    epoch: Count
    objective: Number


class CheckpointState(Record):
    """What a checkpoint holds beside the engine's files: state.json.

    Attributes:
        epoch: how many are behind it.
        rows: their metrics.
        best: the best of them.
        packed: see `TrialEnd`.
        keeping: seconds spent on checkpoints and the ledger.
        peak: bytes of memory.
        files: the digests of the other files, by path.
    """

    epoch: Count
    rows: tuple[EpochReport, ...] = ()
    best: Best | None = None
    packed: Count = 1
    keeping: Number = 0.0
    peak: Count = 0
    files: dict[str, str] = {}

    upgrades: ClassVar = {0: lambda fields: {**fields, "best": fields.get("best") or None}}
