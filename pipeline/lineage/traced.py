"""What `hificl trace` found, for people: each seed's way from the number to its sources, and how checks came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.terminal import Answer, short, table
from pipeline.lineage.checks import SAME, UNRECORDED

if TYPE_CHECKING:
    from rich.console import RenderableType

_DIGITS = 12  # of a digest


@dataclass(frozen=True)
class Traced(Answer):
    """The answer of `trace.trace` or `trace.trace_all`."""

    found: Mapping[str, Any]

    def record(self) -> Any:
        """Return the answer."""
        return self.found

    @property
    def problem(self) -> str | None:
        """What is not as it was recorded."""
        wrong = self.found["wrong"]
        return f"{len(wrong)} not as recorded: {'; '.join(wrong[:5])}" if wrong else None

    def shown(self) -> Iterator[RenderableType]:
        """Give the number, the way of each seed, and how many checks of each kind came out how."""
        if "cell" not in self.found:
            yield from self._all()
            return
        cell = self.found["cell"]
        spread = "" if cell["std"] is None else f" ± {short(cell['std'])}"
        yield f"{cell['study']}: {cell['method']} on {cell['task']}, {cell['backbone']}"
        yield f"{cell['metric']} {short(cell['value'])}{spread} ({cell['unit']})\n"
        for link in self.found["chain"]:
            yield f"seed {link['seed']}: {short(link['value'])}"
            yield from (f"  {name:12}{text}" for name, text in _way(link) if text)
        yield ""
        counts: dict[str, Counter[str]] = {}
        for check in self.found["checks"]:
            counts.setdefault(check["what"], Counter())[check["state"]] += 1
        made = table("checked", "as recorded", "not recorded", "wrong", right=("as recorded", "not recorded", "wrong"))
        for what, states in counts.items():
            wrong = states.total() - states[SAME] - states[UNRECORDED]
            made.add_row(what, str(states[SAME]), str(states[UNRECORDED]), str(wrong), style="red" if wrong else "")
        yield made

    def _all(self) -> Iterator[RenderableType]:
        made = table("study", "numbers", "without one", "seeds", right=("numbers", "without one", "seeds"))
        for name, row in self.found["studies"].items():
            made.add_row(name, str(row["numbers"]), str(row["without_a_number"]), str(row["seeds"]))
        yield made
        yield f"\n{self.found['runs']} runs, {self.found['checks']:,} checks, {len(self.found['wrong'])} wrong"


def _way(link: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the stations of one seed's way, by name, with what names each."""
    run, adapter, data, backbone, code = (
        link.get(name) or {} for name in ("run", "adapter", "data", "backbone", "code")
    )
    yield "evaluation", link["evaluation"]
    yield "run", " ".join(str(run[name]) for name in ("run_id", "name", "status") if run.get(name))
    yield "trial", f"runs/{link['trial']}"
    if adapter:
        yield (
            "adapter",
            f"{adapter['folder']}, sha256 {str(adapter['digest'])[:_DIGITS]}, epoch {short(adapter['epoch'])}",
        )
    if data.get("sources"):
        files = f"{len(data['sources'])} files and {data['images']:,} images below {data['root']}"
        yield "data", f"{data['manifest']}, digest {data['digest'][:_DIGITS]}: {files}"
    if backbone:
        yield "backbone", f"{backbone['name']}, digest {str(backbone['digest'])[:_DIGITS]}"
    if code:
        changed = f", with changes in {', '.join(code['changed'][:3])}" if code.get("dirty") else ""
        yield "commit", f"{code['commit'] or 'not recorded'}{changed}"
