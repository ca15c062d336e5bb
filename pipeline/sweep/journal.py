"""What went wrong in a sweep and how it went on, one line an event in `runs/journal.jsonl`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

_LONGEST = 200  # characters of a fact in a sentence


class Journal:
    """Appends events and reads new ones.

    Args:
        root: the trial store.
    """

    def __init__(self, root: Path | str) -> None:
        self.path = Path(root) / "journal.jsonl"
        self._seen = self.path.stat().st_size if self.path.exists() else 0

    def note(self, event: str, **facts: Any) -> None:
        """Append an event; a disk that is full must not end the sweep that says so."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            pass

    def news(self) -> list[dict[str, Any]]:
        """Return the events since this journal was opened or last asked, whoever wrote them."""
        if not self.path.exists() or self.path.stat().st_size <= self._seen:
            return []
        with self.path.open("rb") as file:
            file.seek(self._seen)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._seen += len(whole)
        return [json.loads(line) for line in whole.decode().splitlines() if line.strip()]


def sentence(row: dict[str, Any]) -> str:
    """Return an event as the user reads it: one line, of what others say the beginning (Ray says pages)."""
    facts = {name: str(value) for name, value in row.items() if name not in ("time", "event")}
    begun = {name: text.partition("\n")[0][:_LONGEST] for name, text in facts.items()}
    more = " (all of it in runs/journal.jsonl)" if begun != facts else ""
    return f"{row['event']}: " + ", ".join(f"{name} {text}" for name, text in begun.items()) + more
