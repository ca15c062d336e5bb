"""What went wrong in a sweep and how it went on, one line an event in `runs/journal.jsonl`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pipeline.progress import say

_LONGEST = 200  # characters of a fact in a sentence


class Journal:
    """Appends events and reads new ones.

    Args:
        root: the trial store.
        whole: whether what it holds already is news too.
    """

    def __init__(self, root: Path | str, *, whole: bool = False) -> None:
        self.path = Path(root) / "journal.jsonl"
        self._seen = self.path.stat().st_size if self.path.exists() and not whole else 0

    def note(self, event: str, **facts: Any) -> None:
        """Append an event; a disk that is full must not end the sweep that says so."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
        try:
            with self.path.open("ab+") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read() not in (b"", b"\n")  # by a full disk, or a crash in the middle of a line
                file.write(("\n" * torn + line + "\n").encode())
        except OSError:
            pass

    def news(self) -> list[dict[str, Any]]:
        """Return the events since this journal was opened or last asked, whoever wrote them, but for torn ones."""
        if not self.path.exists() or self.path.stat().st_size <= self._seen:
            return []
        with self.path.open("rb") as file:
            file.seek(self._seen)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._seen += len(whole)
        found = []
        for line in filter(str.strip, whole.decode(errors="replace").splitlines()):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                say(f"note: {self.path} has a torn line, which is passed over: {line[:40]!r}")
        return found


def sentence(row: dict[str, Any]) -> str:
    """Return an event as the user reads it: one line, of what others say the beginning (Ray says pages)."""
    facts = {name: str(value) for name, value in row.items() if name not in ("time", "event")}
    begun = {name: text.partition("\n")[0][:_LONGEST] for name, text in facts.items()}
    more = " (all of it in runs/journal.jsonl)" if begun != facts else ""
    return f"{row['event']}: " + ", ".join(f"{name} {text}" for name, text in begun.items()) + more
