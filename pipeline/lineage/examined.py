"""What `hificl doctor` found, for people: a row a check, and the way out of what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.terminal import BAD, GOOD, Answer, table

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {"ok": GOOD, "missing": BAD}


@dataclass(frozen=True)
class Examined(Answer):
    """The answer of `doctor.examine`."""

    found: Mapping[str, Any]

    def record(self) -> Any:
        """Return the answer."""
        return self.found

    @property
    def problem(self) -> str | None:
        """What is missing."""
        bad = [check["name"] for check in self.found["checks"] if check["state"] == "missing"]
        return f"missing for profile '{self.found['profile']}': {', '.join(bad)}" if bad else None

    def shown(self) -> Iterator[RenderableType]:
        """Give a row a check, and below what to do about those that are not in order."""
        from rich.text import Text

        made = table("checked", "state", "what was found", title=f"profile {self.found['profile']}")
        for check in self.found["checks"]:
            state = Text(check["state"], style=_STYLES.get(check["state"], ""))
            made.add_row(check["name"], state, check["detail"])
        yield made
        yield ""
        for check in self.found["checks"]:
            if check["way_out"] and check["state"] != "ok":
                yield f"{check['name']}: {check['way_out']}"
