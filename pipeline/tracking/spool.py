"""The spool: what the MLflow store could not take is kept in a file and delivered in order when it answers again.

    runs/.spool/<digest of the address>.jsonl
        {"uri": ...}                                 first line
        {"do": "log_epochs", "run": ..., ...}        one line an entry, appended and flushed to the disk
        {"delivered": n, "runs": {...}}              the first n entries are in the store

An entry that was delivered when a crash came before its mark is delivered again, and every entry may be: runs are
found by their tags, steps that a run has are not logged again, and ending a run twice ends it once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.atomic import sync_folder
from pipeline.errors import HificlError, WorkError
from pipeline.progress import say
from pipeline.tracking import store
from pipeline.tracking.connection import StoreAway
from pipeline.tracking.inputs import Input
from pipeline.tracking.runs import Tracker
from pipeline.trial import digest

AWAY = (StoreAway, store.Unreachable)
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between two tries to reach a store that is away
PENDING = "pending:"  # begins the id of a run that the store has not given an id yet


class SpoolFile:
    """The file of one store; see the module."""

    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.uri = path, uri
        self.entries: list[dict[str, Any]] = []
        self.runs: dict[str, str] = {}  # ids by pending id
        self.unwritten = False  # the disk is full too
        self._offset = 0
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # torn by a crash, so it was never said to be kept
        entries = [row for row in rows if "do" in row]
        for row in rows:
            if "delivered" in row:
                self._offset = row["delivered"]
                self.runs.update(row["runs"])
        self.entries = entries[self._offset :]

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry. On a full disk it is kept in memory alone: the trial store has its content too."""
        lines = [] if self.path.exists() else [{"uri": store.shown(self.uri)}]
        self.entries.append(entry)
        self._append([*lines, entry])

    def delivered(self, count: int) -> None:
        """Mark the first `count` entries as delivered; a spool without entries is removed."""
        self.entries = self.entries[count:]
        self._offset += count
        if self.entries:
            self._append([{"delivered": self._offset, "runs": self.runs}])
            return
        self.path.unlink(missing_ok=True)
        self._offset = 0

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read() not in (b"", b"\n")
                file.write(("\n" * torn + "".join(json.dumps(row) + "\n" for row in rows)).encode())
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.path.parent)
        except OSError as error:
            if not self.unwritten:
                say(f"{self.path} cannot be written ({error.strerror}); MLflow is brought in line from the trial store")
            self.unwritten = True


class SpooledTracker:
    """A `Tracker` for sweeps, whose store may go away: what it cannot take goes to the spool.

    The methods are the tracker's; their arguments must survive JSON. While there is an entry in the spool every
    further one joins it, so that the order is kept.

    Args:
        tracker: the store.
        folder: of the spool (`runs/.spool`).
    """

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        self.tracker = tracker
        self.file = SpoolFile(folder / f"{digest(tracker.uri)[:12]}.jsonl", tracker.uri)
        self.seconds = 0.0  # spent on the spool, MLflow's own time left out: a part of what surviving costs
        self._wait, self._next_try, self._cause = FIRST_WAIT, 0.0, ""

    @property
    def waiting(self) -> int:
        """How many entries the store has not taken yet."""
        return len(self.file.entries)

    # -- what is logged ----------------------------------------------------------------------------------------------

    def open_trial(self, study: str, parent: str, *, key: str, **facts: Any) -> str:
        """See `Tracker.open_trial`; while the store is away, the id that is returned stands for the run to come."""
        run = f"{PENDING}{parent}:{key}"
        made = self._do("open_trial", run, study=study, parent=parent, key=key, **facts)
        return made or run

    def log_epochs(
        self, run_id: str, rows: Sequence[Mapping[str, float]], losses: Sequence[tuple[int, float]] = ()
    ) -> None:
        """See `Tracker.log_epochs`."""
        now = time.time_ns() // 1_000_000
        self._do("log_epochs", run_id, rows=[dict(row) for row in rows], at=now, losses=list(losses))

    def tag(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """See `Tracker.tag`."""
        self._do("tag", run_id, tags=dict(tags))

    def log_ledger(self, run_id: str, file: Path) -> None:
        """See `Tracker.log_ledger`."""
        self._do("log_ledger", run_id, file=str(file))

    def log_adapter(self, run_id: str, folder: Path) -> None:
        """See `Tracker.log_adapter`."""
        self._do("log_adapter", run_id, folder=str(folder))

    def log_evaluation(self, run_id: str, metrics: Mapping[str, float], file: Path) -> None:
        """See `Tracker.log_evaluation`."""
        self._do("log_evaluation", run_id, metrics=dict(metrics), file=str(file))

    def log_answers(self, run_id: str, file: Path, data: Input, description: str) -> None:
        """See `Tracker.log_answers`."""
        self._do("log_answers", run_id, file=str(file), data=data, description=description)

    def close(self, run_id: str, status: str, error: str | None = None) -> None:
        """See `Tracker.close`."""
        self._do("close", run_id, status=status, error=error)

    def ended_trials(self, study: str, parent: str) -> dict[str, tuple[str, str]]:
        """See `Tracker.ended_trials`; a store that is away, or behind its spool, says of none that it has ended."""
        if self.waiting:
            return {}
        try:
            return self.tracker.ended_trials(study, parent)
        except AWAY:
            return {}

    def close_all(self, status: str) -> None:
        """End every run that is open; with the store away that is left to the next start."""
        if not self.waiting:
            self.tracker.close_all(status)

    # -- delivery ----------------------------------------------------------------------------------------------------

    def deliver(self) -> bool:
        """Hand over what the spool holds, in order; return whether nothing is left."""
        done = 0
        try:
            if self.file.entries:
                store.probe(self.tracker.uri)
            for entry in self.file.entries:
                self._deliver(entry)
                done += 1
        except HificlError as error:
            self._away(error)
        if done:
            self.file.delivered(done)
            say(f"the MLflow store took {done} entries of the spool{f', {self.waiting} are left' * bool(self.waiting)}")
        if not self.waiting:
            self._wait = FIRST_WAIT
        return not self.waiting

    def settle(self, patience: float) -> None:
        """Deliver everything, waiting for the store if it is away.

        Args:
            patience: seconds to wait.

        Raises:
            WorkError: it did not come back; the message names the store and what is kept where.
        """
        until = time.monotonic() + patience
        while not self.deliver():
            if time.monotonic() >= until:
                trials = len({entry["run"] for entry in self.file.entries})
                raise WorkError(
                    f"the MLflow store is away ({self._cause}); {self.waiting} entries (metrics, parameters, tags) of "
                    f"{trials} runs are kept in {self.file.path}",
                    where=store.shown(self.tracker.uri),
                    way_out="Bring the store back and run the same command again: it delivers them and trains nothing",
                )
            time.sleep(min(FIRST_WAIT, patience))

    def _do(self, name: str, run: str, /, **arguments: Any) -> Any:
        entry = {"do": name, "run": run, "with": arguments}
        if self.waiting:
            self._queue(entry)
            return None
        try:
            return self._call(entry)
        except AWAY as error:
            say(f"the MLflow store is away, metrics wait in {self.file.path}: {error.what}")
            self._away(error)
            self._keep(entry)
            return None

    def _keep(self, entry: dict[str, Any]) -> None:
        started = time.perf_counter()
        self.file.add(entry)
        self.seconds += time.perf_counter() - started

    def _queue(self, entry: dict[str, Any]) -> None:
        self._keep(entry)
        if time.monotonic() >= self._next_try:
            self.deliver()

    def _away(self, error: HificlError) -> None:
        self._cause = error.what
        self._next_try = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _deliver(self, entry: dict[str, Any]) -> None:
        run = self._id(entry["run"])
        try:
            if not run.startswith(PENDING):
                self.tracker.adopt(run)  # what an interrupted call has logged is asked for, so that it is not repeated
            made = self._call(entry)
        except AWAY:
            raise
        except (HificlError, OSError) as error:
            say(f"not delivered to MLflow: {entry['do']} of {run}: {error}")
            return
        if entry["do"] == "open_trial":
            self.file.runs[entry["run"]] = made

    def _call(self, entry: dict[str, Any]) -> Any:
        method = getattr(self.tracker, entry["do"])
        if entry["do"] == "open_trial":
            return method(**entry["with"])
        return method(self._id(entry["run"]), **entry["with"])

    def _id(self, run: str) -> str:
        return self.file.runs.get(run, run)
