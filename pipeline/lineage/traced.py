"""What `hificl trace` answers: each seed's way from the number to its sources, and how the checks came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from pipeline.core.terminal import Answer, short, table
from pipeline.lineage.run_record import SAME, UNRECORDED, Check

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.core.plain_yaml import Json
    from pipeline.records.evaluation import CodeVersion

_DIGITS = 12  # of a digest


@dataclass(frozen=True)
class NamedRun:
    """A run that the number names and MLflow does not have."""

    run_id: str


@dataclass(frozen=True)
class TracedRun(NamedRun):
    """A run as MLflow has it; `store` is the store's address."""

    name: str | None
    study: str | None
    status: str
    parent: str | None
    adapter_digest: str | None
    store: str


@dataclass(frozen=True)
class TracedAdapter:
    """An adapter's folder, its digest (None: the folder is gone), and the epoch that it is of."""

    folder: str
    digest: str | None
    epoch: int | None


@dataclass(frozen=True)
class NamedManifest:
    """A manifest's file, and its digest; None where it cannot be read."""

    manifest: str
    digest: str | None


@dataclass(frozen=True)
class TracedManifest(NamedManifest):
    """The data that a manifest was drawn from.

    Attributes:
        seed: of the draw.
        root: the folder of sources and images.
        sources: digests of the official files, by path.
        images: how many.
    """

    seed: int
    root: str
    sources: dict[str, str]
    images: int


@dataclass(frozen=True)
class TracedBackbone:
    """A backbone and the digest that its weights had."""

    name: str
    digest: str


@dataclass(frozen=True)
class TracedCode:
    """The code that a trial was trained with; `diff_lines` is how long its own changes are."""

    commit: str | None
    dirty: bool | None
    changed: list[str]
    diff_lines: int
    earlier_commits: list[str | None]
    versions: dict[str, str | None]


@dataclass(frozen=True)
class MadeFrom:
    """What a trial was made from; `adapter` is None for a method without training."""

    config: Json
    adapter: TracedAdapter | None
    data: NamedManifest
    backbone: TracedBackbone
    code: TracedCode


@dataclass(frozen=True)
class Chain:
    """The way of one seed's number back to what it was made from.

    Attributes:
        run: None where the number names none.
        trial: its key.
        evaluation: the score's file, and the code that scored.
        origin: None where the trial's record cannot be read.
        by_hand: what was done to the trial by hand, oldest first.
    """

    seed: int
    value: float | None
    run: NamedRun | None
    trial: str | None
    evaluation: str
    scored_by: CodeVersion | None
    origin: MadeFrom | None
    by_hand: list[str] = field(default_factory=list)

    def record(self) -> Json:
        """Return the stations that there are."""
        origin = asdict(self.origin) if self.origin else {}
        return {
            "seed": self.seed, "value": self.value, "run": asdict(self.run) if self.run else {}, "trial": self.trial,
            "evaluation": self.evaluation, "scored_by": self.scored_by.model_dump() if self.scored_by else None,
            **{name: station for name, station in origin.items() if station is not None},
            **({"by_hand": self.by_hand} if self.by_hand else {}),
        }  # fmt: skip

    def stations(self) -> Iterator[tuple[str, str]]:
        """Give each station's name, and what it is known by."""
        yield "evaluation", self.evaluation
        if isinstance(self.run, TracedRun):
            yield "run", " ".join(filter(None, (self.run.run_id, self.run.name, self.run.status)))
        elif self.run:
            yield "run", self.run.run_id
        yield "trial", f"runs/{self.trial}"
        yield from (("by hand", act) for act in self.by_hand)
        if self.origin is None:
            return
        adapter, data, backbone, code = self.origin.adapter, self.origin.data, self.origin.backbone, self.origin.code
        if adapter:
            digest = f"sha256 {str(adapter.digest)[:_DIGITS]}"
            yield "adapter", f"{adapter.folder}, {digest}, epoch {short(adapter.epoch)}"
        if isinstance(data, TracedManifest) and data.sources:
            files = f"{len(data.sources)} files and {data.images:,} images below {data.root}"
            yield "data", f"{data.manifest}, digest {str(data.digest)[:_DIGITS]}: {files}"
        yield "backbone", f"{backbone.name}, digest {backbone.digest[:_DIGITS]}"
        changed = f", with changes in {', '.join(code.changed[:3])}" if code.dirty else ""
        yield "commit", f"{code.commit or 'not recorded'}{changed}"


@dataclass(frozen=True)
class TracedCell:
    """The number that was asked for, as its study has it; `file` is the report that was named."""

    study: str
    file: str | None
    backbone: str
    task: str
    method: str
    metric: str
    value: float | None
    std: float | None
    unit: str
    seeds: list[int]


@dataclass(frozen=True)
class TracedNumber(Answer):
    """One number's way back, seed by seed, and every check that was made on it."""

    cell: TracedCell
    chains: list[Chain]
    checks: list[Check]
    wrong: list[str]

    def record(self) -> Json:
        """Return `cell`, one entry of `chain` a seed, `checks`, `wrong` (sentences) and `intact`."""
        return {
            "cell": asdict(self.cell), "chain": [chain.record() for chain in self.chains],
            "checks": [asdict(check) for check in self.checks], "wrong": [*self.wrong], "intact": not self.wrong,
        }  # fmt: skip

    @property
    def problem(self) -> str | None:
        """What is not as it was recorded."""
        return _problem(self.wrong)

    def shown(self) -> Iterator[RenderableType]:
        """Give the number, the way of each seed, and how many checks of each kind came out how."""
        cell = self.cell
        spread = "" if cell.std is None else f" ± {short(cell.std)}"
        yield f"{cell.study}: {cell.method} on {cell.task}, {cell.backbone}"
        yield f"{cell.metric} {short(cell.value)}{spread} ({cell.unit})\n"
        for chain in self.chains:
            yield f"seed {chain.seed}: {short(chain.value)}"
            yield from (f"  {name:12}{text}" for name, text in chain.stations())
        yield ""
        counts: dict[str, Counter[str]] = {}
        for check in self.checks:
            counts.setdefault(check.what, Counter())[check.state] += 1
        made = table("checked", "as recorded", "not recorded", "wrong", right=("as recorded", "not recorded", "wrong"))
        for kind, states in counts.items():
            wrong = states.total() - states[SAME] - states[UNRECORDED]
            made.add_row(kind, str(states[SAME]), str(states[UNRECORDED]), str(wrong), style="red" if wrong else "")
        yield made


@dataclass(frozen=True)
class TracedStudy:
    """How many numbers of a study were traced, how many cells have none, and the seeds behind the numbers."""

    numbers: int
    without_a_number: int
    seeds: int


@dataclass(frozen=True)
class TracedReports(Answer):
    """Every number of some studies; `runs` and `checks` are how many."""

    studies: dict[str, TracedStudy]
    runs: int
    checks: int
    wrong: list[str]

    def record(self) -> Json:
        """Return the fields, and `intact`."""
        return asdict(self) | {"intact": not self.wrong}

    @property
    def problem(self) -> str | None:
        """What is not as it was recorded."""
        return _problem(self.wrong)

    def shown(self) -> Iterator[RenderableType]:
        """Give a row a study, and the sums."""
        made = table("study", "numbers", "without one", "seeds", right=("numbers", "without one", "seeds"))
        for name, study in self.studies.items():
            made.add_row(name, str(study.numbers), str(study.without_a_number), str(study.seeds))
        yield made
        yield f"\n{self.runs} runs, {self.checks:,} checks, {len(self.wrong)} wrong"


def _problem(wrong: list[str]) -> str | None:
    return f"{len(wrong)} not as recorded: {'; '.join(wrong[:5])}" if wrong else None
