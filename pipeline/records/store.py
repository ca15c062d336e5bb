"""The trial store: one folder a trial under `runs/`, keyed by content, and its lock.

config.json      the configuration and where it came from
metrics.jsonl    one line an epoch
losses.jsonl     one line an epoch: the training loss of every step
compared.jsonl   one line a point at which the trials of its search were compared: the loss there
checkpoint/      the last two epochs' states, for resuming (`train.checkpoint`)
adapter/         the chosen epoch's adapter
done.json        written last, by an atomic rename: the trial is done

Beside them, acts.jsonl has what was done to trials by hand, and journal.jsonl what happened to a sweep (`journal`).

All but the checkpoints' engine files and the adapter are written here, each whole. Resume goes by this ledger and never
by Ray's history, which offers finished trials again.

A process that trains a trial takes it up (`TrialFolder.take`): it writes every file first in a folder of its own,
`.writing/<id>/`, and renames it into its place. Taking a trial up removes the folder of the process before, so that one
writes nothing any more, even if it was frozen just before a rename: the rename finds no file. This holds on every file
system that renames atomically, shared ones too, and needs neither a lock nor a clock. Who holds the store has such
a folder too, `.holder/<id>/`, through which it ends and reopens trials.
"""

from __future__ import annotations

import errno
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.core.files import (
    GONE,
    Superseded,
    disk_error,
    file_digest,
    folder_digest,
    remove_file,
    remove_folder,
    write_atomic,
)
from pipeline.core.locks import held, holder
from pipeline.core.progress import say
from pipeline.records import Unreadable, Unseen, lines
from pipeline.records.trial import (
    AGAIN,
    Act,
    Attempts,
    ComparedLoss,
    EpochReport,
    Provenance,
    StepLosses,
    TrialEnd,
    TrialRecord,
)

_CACHED_SECONDS = 60.0  # NFS' acdirmax
WRITING = ".writing"  # what the process that trains a trial writes in
HOLDER = ".holder"  # what the process that holds the store writes in
LOSSES = "losses.jsonl"
LEASES = ".leases"  # a lock a trial, for processes that share the store
_POLL_SECONDS = 0.5
_FREE = "Wait for it to end, or stop it, and run again"
_NO_ACT = "Remove the line to undo what it says"


class Displaced(Superseded):
    """Another process holds the store that this one held: it was frozen, or cut off, for so long."""


class TrialStore:
    """Reads and writes `runs/`.

    What is read of a trial raises InputError where the file is damaged or newer than this code.

    Args:
        root: the folder.
        within: of the sweep that holds the store (`lock`); None: nobody's.
    """

    def __init__(self, root: Path | str = "runs", within: Path | None = None) -> None:
        self.root, self.within = Path(root), within
        self._acts = self.root / "acts.jsonl"
        self._ledger: tuple[tuple[int, int], list[Act]] | None = None  # as the file was, and what was read of it

    def folder(self, key: str) -> Path:
        """Return the folder of the trial `key`."""
        return self.root / key

    def trial(self, key: str) -> TrialFolder:
        """Return the records of the trial `key`."""
        return TrialFolder(self.folder(key))

    def open(self, config: TrialConfig, provenance: Provenance | None = None) -> Path:
        """Create the folder of a trial and its config.json.

        One that is there is kept; where the code has moved on since, it names both versions.

        Args:
            config: the trial.
            provenance: None: a slot takes the trial up, which knows none.
        """
        trial = self.trial(config.key)
        record = TrialRecord(config=config.model_dump(mode="json"), provenance=provenance or Provenance())
        if not trial.begun:
            trial.begin(record)
        elif provenance is not None and (before := trial.record()).provenance.commit != provenance.commit:
            trial.begin(before.resumed(record))
        return trial.path

    def config(self, key: str) -> TrialConfig:
        """Return the configuration that the trial was started with."""
        return self.trial(key).config()

    def record(self, key: str) -> TrialRecord:
        """Return what the trial was started with, as it was written, and where it came from."""
        return self.trial(key).record()

    def done(self, key: str) -> TrialEnd | None:
        """Return how the trial ended, or None while it is open."""
        return self.trial(key).end()

    def finished(self, key: str) -> bool:
        """Whether the trial ended in a way that training again would repeat."""
        end = self.done(key)
        return end is not None and end.final

    def settled(self, key: str) -> bool:
        """Whether a sweep has nothing to do for the trial: it is finished, or was stopped by hand."""
        return self.finished(key) or self.halted(key)

    def halted(self, key: str) -> bool:
        """Whether the trial was stopped by hand, and has no epoch left that it may train."""
        stop = self.stop_of(key)
        return stop is not None and (stop.after is None or len(self.epochs(key)) >= stop.after)

    def stop_of(self, key: str) -> Act | None:
        """Return the act by which the trial is stopped, if it is."""
        acts = [act for act in self.acts(key) if act.act in ("stop", "resume")]
        return acts[-1] if acts and acts[-1].act == "stop" else None

    def acts(self, key: str | None = None) -> list[Act]:
        """Return what was done by hand, oldest first: to one trial, or to all. A ledger is read once for many trials.

        Raises:
            InputError: a line is damaged, and not just the last one torn.
            Unreadable: the system does not let it be read now.
        """
        try:
            state = self._acts.stat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Unreadable.of(error, self._acts) from error
        seen = state.st_ino, state.st_mtime_ns  # each act makes a file anew
        if self._ledger is None or self._ledger[0] != seen:
            self._ledger = seen, list(lines(Act, self._acts, _NO_ACT))
        return [act for act in self._ledger[1] if key in (None, act.trial)]

    def act(self, act: Act) -> None:
        """Keep what was done by hand; a sweep that runs looks before each epoch.

        Raises:
            InputError: another process writes an act at the same time, or the ledger is damaged.
            WorkError: it cannot be written.
        """
        with held(self.root / ".acts", "an act by hand"):
            acts = [*self.acts(), act]
            write_atomic(self._acts, "".join(act.text(indent=None) + "\n" for act in acts))

    def objective(self, key: str) -> float | None:
        """Return what a trial is chosen by, below every other where it diverged; None where it has not ended."""
        end = self.done(key)
        if end is None or not end.final:
            return None
        return float("-inf") if end.objective is None else end.objective

    def finish(self, key: str, end: TrialEnd) -> None:
        """Close a trial; the last thing that is written.

        Raises:
            Superseded: another process holds the store by now.
            WorkError: the folder cannot be written.
        """
        TrialFolder(self.folder(key), self.within).finish(end)

    def reopen(self, key: str) -> None:
        """Take back the end of a trial that was stopped or failed, so that it is continued.

        Raises:
            Superseded: another process holds the store by now, and it may be its end.
            WorkError: the folder cannot be written.
        """
        TrialFolder(self.folder(key), self.within).reopen()

    def epochs(self, key: str) -> list[EpochReport]:
        """Return the metrics by epoch."""
        return self.trial(key).epochs()

    def all_keys(self) -> list[str]:
        """Return the keys of all trials, open and done.

        Raises:
            Unreadable: the system does not let the folder be read now.
        """
        return sorted(path.name for path in _entries(self.root) if self.trial(path.name).begun)

    @contextmanager
    def lock(self, what: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the store for one sweep or evaluation, which is `what` others are told; `wait` until it is free.

        Raises:
            InputError: another process holds it, or one of its trials; the message names it.
            WorkError: the folder cannot be written.
        """
        waits = f"{what} waits for {self.root}, held by "
        with held(self._lock, what, wait=None if wait else 0.0, waits=lambda by: say(waits + by)):
            while (by := next(filter(None, map(holder, self._leases())), None)) is not None:
                if not wait:
                    raise InputError(f"held by {by}", where=str(self.root), way_out=_FREE)
                time.sleep(_POLL_SECONDS)
            self.within = self._taken()
            try:
                yield
            finally:
                shutil.rmtree(self.within, ignore_errors=True)
                self.within = None

    def _taken(self) -> Path:
        """Make the folder of this holder, and remove those of the ones before."""
        folder = self.root / HOLDER / uuid.uuid4().hex
        try:
            folder.mkdir(parents=True)
            for before in (self.root / HOLDER).iterdir():
                if before != folder:
                    remove_folder(before)
        except OSError as error:
            raise disk_error(error, folder) from error
        return folder

    def check_held(self) -> None:
        """See that no other process has taken the store over; where that cannot be told now, go on.

        Raises:
            Displaced: one has.
        """
        if self.within is None:
            return
        probe = self.within / uuid.uuid4().hex
        try:
            probe.touch()  # by the server itself, where a client's listing may be of before
            probe.unlink()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                raise Displaced(
                    "another process has taken the trial store over, and goes on with it", where=str(self.root),
                    way_out="This one stood still for too long; wait for the other, then run again",
                ) from None  # fmt: skip

    @contextmanager
    def lease(self, key: str, what: str) -> Iterator[bool]:
        """Hold one trial, beside processes that hold others; yield whether it was free.

        Who holds the store looks for leases, and who leases looks for the store's holder, each behind its own lock. So
        of two at once at least one gives way.

        Raises:
            InputError: a sweep or an evaluation holds the store; the message names it.
            WorkError: the folder cannot be written.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self.root / LEASES / key, what))
                free = True
            except InputError:
                free = False
            if free and (by := holder(self._lock)) is not None:
                raise InputError(f"held by {by}", where=str(self.root), way_out=_FREE)
            yield free

    @property
    def _lock(self) -> Path:
        return self.root / ".lock"

    def _leases(self) -> list[Path]:
        """Return the leases that are held, or were when their process was killed: what is let go is empty."""
        return [path for path in _entries(self.root / LEASES) if not path.suffix and path.stat().st_size]

    def tried(self, key: str) -> Attempts:
        """Return how often processes that leased a trial have ended without a word, or by an error."""
        try:
            return Attempts.read(self._tried(key), f"Remove {self._tried(key)}")
        except FileNotFoundError:
            return Attempts()

    def note_tried(self, key: str, attempts: Attempts | None) -> None:
        """Keep `attempts` of a leased trial; None: it ended, or was stopped in order."""
        if attempts is None:
            self._tried(key).unlink(missing_ok=True)
        else:
            write_atomic(self._tried(key), attempts.text())

    def _tried(self, key: str) -> Path:
        return self.root / LEASES / f"{key}.tried"


def _entries(folder: Path) -> list[Path]:
    """Return what lies in a folder; nothing where there is none.

    Raises:
        Unreadable: the system does not let it be read now; `glob` takes such a folder for an empty one.
    """
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unreadable.of(error, folder) from error


def check_adapter(folder: Path) -> None:
    """Hold an adapter that lies in a trial's folder against the end of its training; another is left alone.

    Raises:
        InputError: see `TrialFolder.check_adapter`.
    """
    trial = TrialFolder(folder.resolve().parent)
    if folder.resolve() == trial.adapter:
        trial.check_adapter()


class TrialFolder:
    """The records of one trial, in the folder `path`.

    Args:
        path: the folder.
        within: what `take` gave; None: the store's own writes.
    """

    def __init__(self, path: Path, within: Path | None = None) -> None:
        self.path, self.within = path, within
        self.adapter, self.checkpoint = path / "adapter", path / "checkpoint"
        self.metrics, self._losses, self._compared = path / "metrics.jsonl", path / LOSSES, path / "compared.jsonl"
        self._config, self._done = path / "config.json", path / "done.json"

    def take(self) -> TrialFolder:
        """Take the trial up for this process alone; return its records, to be written by this process alone.

        Whoever had taken it up raises `Superseded` at its next write.

        Raises:
            Superseded: another process took it up at the same time.
            WorkError: the folder cannot be written.
        """
        place, name = self.path / WRITING, uuid.uuid4().hex
        draft = self.path / f"{GONE}{name}"
        try:
            (draft / name).mkdir(parents=True)
            for left in self.path.glob(f"{GONE}*"):  # by a process that was killed meanwhile
                if left != draft:
                    shutil.rmtree(left, ignore_errors=True)
            while True:
                remove_folder(place)
                try:
                    draft.rename(place)
                    return TrialFolder(self.path, place / name)
                except OSError as error:  # somebody else was quicker, and is superseded now
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
        except FileNotFoundError as error:  # another process has removed what was to become of it
            raise Superseded("another process has just taken the trial up", where=str(place)) from error
        except OSError as error:
            raise disk_error(error, place) from error

    def release(self) -> None:
        """Give back what `take` gave."""
        if self.within is not None:
            shutil.rmtree(self.within, ignore_errors=True)
            with suppress(OSError):  # of the next process by now
                self.within.parent.rmdir()

    @property
    def begun(self) -> bool:
        """Whether there is such a trial."""
        return self._config.exists()

    def record(self) -> TrialRecord:
        """Return what the trial was started with.

        Raises:
            InputError: there is no such trial, or its record is damaged.
        """
        try:
            return TrialRecord.read(self._config, AGAIN)
        except FileNotFoundError:
            raise InputError("no such trial", where=str(self._config), way_out="Run `hificl sweep` first") from None

    def config(self) -> TrialConfig:
        """Return the configuration that the trial was started with.

        Raises:
            InputError: as `record`, or this code does not know the configuration.
        """
        return self.record().trial(str(self._config))

    def begin(self, record: TrialRecord) -> None:
        """Write what the trial is started with."""
        write_atomic(self._config, record.text())

    def end(self) -> TrialEnd | None:
        """Return how the trial ended, or None while it is open.

        Where the file is not there, its folder is listed: a client of NFS remembers for half a minute that a file was
        not there, and a listing lets it ask again.

        Raises:
            InputError: the record is damaged.
            Unreadable: the system does not let it be read now.
        """
        for _ in range(2):
            try:
                return TrialEnd.read(self._done, AGAIN)
            except FileNotFoundError:
                try:
                    if self._done.name not in {file.name for file in self.path.iterdir()}:
                        return None
                except (FileNotFoundError, NotADirectoryError):
                    return None
                except OSError as error:
                    raise Unreadable.of(error, self.path) from error
        return None

    def finish(self, end: TrialEnd) -> None:
        """Close the trial, with the digests of what it leaves; the last thing that is written."""
        digests = {"adapter_digest": self._adapter_digest()}
        if end.final:  # of another the files may still change
            files = {"metrics_digest": self.metrics, "losses_digest": self._losses}
            digests |= {name: file_digest(path) for name, path in files.items() if path.exists()}
        write_atomic(self._done, end.model_copy(update=digests).text(), self.within)

    def check_adapter(self) -> None:
        """Hold the adapter against the end of its training; one of an open trial, or of before, has no digest.

        Raises:
            InputError: it is damaged, or another one.
            Unreadable: the system does not let it be read now.
            Unseen: this machine does not see it yet.
        """
        end = self.end()
        wanted = end.adapter_digest if end else None
        if wanted is None or self._adapter_digest() == wanted:
            return
        list(self.path.iterdir())  # as in `end`: it may have been there, and not seen
        if (present := self._adapter_digest()) != wanted:
            if present is None:
                self._may_be_hidden(self.adapter)
            raise InputError(
                f"not the adapter that the training ended with (digest {present and present[:12]}, done.json has "
                f"{wanted[:12]}): damaged or exchanged",
                where=str(self.adapter), way_out="Put it back from a copy. Or r" + AGAIN[1:],
            )  # fmt: skip

    def _adapter_digest(self) -> str | None:
        try:
            return folder_digest(self.adapter)
        except OSError as error:
            raise Unreadable.of(error, self.adapter) from error

    def reopen(self) -> None:
        """Take back the end of a trial that was stopped or failed, so that it is continued."""
        remove_file(self._done, self.within)

    def epochs(self) -> list[EpochReport]:
        """Return the metrics by epoch; one that was run again after a crash replaces its first try.

        Raises:
            InputError: a line is damaged, and not just the last one torn; or the trial ended with other metrics.
            Unseen: it has just ended with metrics that this machine does not see yet.
        """
        self._check("metrics_digest", self.metrics)
        rows = {row.epoch: row for row in lines(EpochReport, self.metrics, AGAIN)}
        return [rows[epoch] for epoch in sorted(rows)]

    def _check(self, name: str, path: Path) -> None:
        """Hold a file against the digest of it that the trial ended with, if there is one."""
        end = self.end()
        wanted = getattr(end, name) if end else None
        if wanted is None or (path.exists() and file_digest(path) == wanted):
            return
        list(self.path.iterdir())  # as in `end`
        if not path.exists() or file_digest(path) != wanted:
            self._may_be_hidden(path)
            raise InputError("damaged: not what the trial ended with", where=str(path), way_out=AGAIN)

    def _may_be_hidden(self, path: Path) -> None:
        """Raise `Unseen` in the first minute: a client of a shared file system may for as long see what was before."""
        if time.time() - self._done.stat().st_mtime < _CACHED_SECONDS:
            raise Unseen(
                "the trial has just ended with another content than is seen here, as on a shared file system of which "
                "this machine keeps what was before",
                where=str(path), way_out="In a minute, run the same command again",
            )  # fmt: skip

    def write_epochs(self, reports: Sequence[EpochReport]) -> None:
        """Write the metrics of all epochs."""
        write_atomic(self.metrics, "".join(report.text(indent=None) + "\n" for report in reports), self.within)

    def losses(self) -> dict[int, tuple[float, ...]]:
        """Return the training loss of every step by epoch; trials of before it was kept have none.

        Raises:
            InputError: as `epochs`.
        """
        self._check("losses_digest", self._losses)
        rows = {row.epoch: row.train_loss for row in lines(StepLosses, self._losses, AGAIN)}
        return dict(sorted(rows.items()))

    def add_losses(self, epoch: int, losses: Sequence[float]) -> None:
        """Keep an epoch's training loss of every step, with the seven digits that a sum of fp32 numbers has."""
        self._write_losses({**self.losses(), epoch: tuple(float(f"{value:.7g}") for value in losses)})

    def compared(self) -> list[ComparedLoss]:
        """Return the losses that the trial was compared by.

        Raises:
            InputError: a line is damaged, and not just the last one torn.
        """
        return list(lines(ComparedLoss, self._compared, AGAIN))

    def write_compared(self, losses: Iterable[ComparedLoss]) -> None:
        """Write the losses that the trial is compared by."""
        write_atomic(self._compared, "".join(loss.text(indent=None) + "\n" for loss in losses), self.within)

    def forget_losses(self, after: int) -> None:
        """Drop the curves of epochs that a trial is going to train again."""
        kept = self.losses()
        if any(epoch > after for epoch in kept):
            self._write_losses({epoch: losses for epoch, losses in kept.items() if epoch <= after})

    def _write_losses(self, kept: Mapping[int, tuple[float, ...]]) -> None:
        rows = (StepLosses(epoch=number, train_loss=values) for number, values in kept.items())
        write_atomic(self._losses, "".join(row.text(indent=None) + "\n" for row in rows), self.within)
