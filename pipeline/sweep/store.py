"""The trial store: one folder a trial under `runs/`, keyed by content, and the ledger of what is done.

    runs/<key>/config.json      the TrialConfig and where it came from
    runs/<key>/metrics.jsonl    one line an epoch
    runs/<key>/losses.jsonl     one line an epoch: the training loss of every step
    runs/<key>/checkpoint/      the last two epochs' states, for resuming (`train.checkpoint`)
    runs/<key>/adapter/         the chosen epoch's adapter
    runs/<key>/done.json        written last, by an atomic rename: the trial is done

Resume goes by this ledger and never by Ray's history, which offers finished trials again.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.atomic import write_atomic
from pipeline.digests import folder_digest
from pipeline.errors import InputError, WorkError
from pipeline.progress import say
from pipeline.trial import LOSSES, TrialConfig

FINAL = ("finished", "diverged")  # ends that training again would only repeat
_WAIT_SECONDS = 1.0


class TrialStore:
    """Reads and writes `runs/`.

    Args:
        root: the folder, usually `runs`.
    """

    def __init__(self, root: Path | str = "runs") -> None:
        self.root = Path(root)

    def folder(self, key: str) -> Path:
        """Return the folder of the trial `key`."""
        return self.root / key

    def open(self, config: TrialConfig, provenance: Mapping[str, Any]) -> Path:
        """Create the folder of a trial and its config.json.

        One that is there is kept; where the code has moved on since, it names both versions.
        """
        folder = self.folder(config.key)
        path = folder / "config.json"
        record: dict[str, Any] = {"config": config.model_dump(mode="json"), "provenance": dict(provenance)}
        if path.exists():
            before = self._read(path)
            old = before.get("provenance", {}).get("commit")
            if not provenance or old == provenance.get("commit"):
                return folder  # a slot that takes the trial up knows no provenance
            record = {**before, **record, "earlier_commits": [*before.get("earlier_commits", []), old]}
        write_atomic(path, json.dumps(record, indent=1, sort_keys=True))
        return folder

    def config(self, key: str) -> TrialConfig:
        """Return the configuration that the trial was started with."""
        record = self._read(self.folder(key) / "config.json")
        return TrialConfig.model_validate(record["config"])

    def raw_config(self, key: str) -> dict[str, Any]:
        """Return the configuration as it was written, whose hash is the key also under newer code."""
        return self._read(self.folder(key) / "config.json")["config"]

    def earlier_commits(self, key: str) -> list[str]:
        """Return the commits that began the trial, where the code had moved on when it was resumed."""
        return self._read(self.folder(key) / "config.json").get("earlier_commits", [])

    def provenance(self, key: str) -> dict[str, Any]:
        """Return the code version and machine that the trial was started with."""
        return self._read(self.folder(key) / "config.json").get("provenance", {})

    def done(self, key: str) -> dict[str, Any] | None:
        """Return the content of done.json, or None while the trial is open."""
        path = self.folder(key) / "done.json"
        return self._read(path) if path.exists() else None

    def finished(self, key: str) -> bool:
        """Whether the trial ended in a way that training again would repeat."""
        done = self.done(key)
        return done is not None and done["status"] in FINAL

    def finish(self, key: str, record: Mapping[str, Any]) -> None:
        """Close a trial; the last thing that is written."""
        adapter = folder_digest(self.folder(key) / "adapter")
        full = {**record, **({"adapter_digest": adapter} if adapter else {})}
        write_atomic(self.folder(key) / "done.json", json.dumps(full, indent=1, sort_keys=True))

    def reopen(self, key: str) -> None:
        """Take back the end of a trial that was stopped or failed, so that it is continued."""
        (self.folder(key) / "done.json").unlink(missing_ok=True)

    def epochs(self, key: str) -> list[dict[str, Any]]:
        """Return the metrics by epoch; a line torn by a crash is left out."""
        return list(self._lines(key, "metrics.jsonl").values())

    def losses(self, key: str) -> dict[int, list[float]]:
        """Return the training loss of every step by epoch; trials of before it was kept have none."""
        return {epoch: row["train_loss"] for epoch, row in self._lines(key, LOSSES).items()}

    def _lines(self, key: str, name: str) -> dict[int, dict[str, Any]]:
        path = self.folder(key) / name
        rows: dict[int, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                rows[row["epoch"]] = row  # an epoch run again after a crash replaces its first try
        return dict(sorted(rows.items()))

    def all_keys(self) -> list[str]:
        """Return the keys of all trials, open and done."""
        return sorted(p.parent.name for p in self.root.glob("*/config.json"))

    @contextmanager
    def lock(self, what: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the store for one sweep or evaluation.

        Args:
            what: who holds it, for the others.
            wait: until it is free, where another process holds it.

        Raises:
            InputError: another process holds it; the message names it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".lock", "a+", encoding="utf-8") as handle:
            told = False
            while not _locked(handle):
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                if not wait:
                    raise InputError(
                        f"held by {holder}",
                        where=str(self.root),
                        way_out="Wait for it to end, or stop it, and run again",
                    )
                if not told:
                    say(f"{what} waits for {self.root}, held by {holder}")
                told = True
                time.sleep(_WAIT_SECONDS)
            handle.truncate(0)
            handle.write(f"{what}, pid {os.getpid()} on {os.uname().nodename}, since {time.strftime('%F %T')}")
            handle.flush()
            try:
                yield
            finally:
                handle.truncate(0)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError("no such trial", where=str(path), way_out="Run `hificl sweep` first") from None
        except json.JSONDecodeError as error:
            way_out = f"Remove the folder {path.parent} to train this trial again"
            raise WorkError(f"damaged: {error}", where=str(path), way_out=way_out) from None


def _locked(handle: IO[str]) -> bool:
    """Take the lock if it is free, and say so."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
