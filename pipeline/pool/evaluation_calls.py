"""How a cluster shares out an evaluation: trials that answer together, splits that are answered in parts.

Few trials on many slots: each split is cut into parts. Many trials: those that can share their passes are decoded in
the same batches, `sweep.pack` at most. Both at once where there is both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.load import TrialRequest
from pipeline.config.trial import EvaluationConfig
from pipeline.evaluate.generate import SplitPart
from pipeline.evaluate.score import Answers

Job = tuple[TrialRequest, EvaluationConfig]
TOGETHER = 8  # adapters in one batch where `sweep.pack` is auto; a batch has as many rows as without them


@dataclass(frozen=True)
class Unit:
    """One call of an evaluator: some trials' answers to one part of their split."""

    jobs: tuple[Job, ...]
    part: SplitPart

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What tells it apart."""
        return (*(evaluation.key for _, evaluation in self.jobs), self.part)

    @property
    def resident(self) -> tuple[str, str]:
        """What an evaluator keeps from one unit to the next."""
        config = self.jobs[0][0].config
        return config.backbone, config.task


@dataclass(frozen=True)
class Complete:
    """The other call of an evaluator: the score of one job, all of whose parts have been answered."""

    job: Job
    parts: list[Answers]

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What tells it apart."""
        return (self.job[1].key,)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Whose call it is, as of a `Unit`."""
        return (self.job,)


EvaluatorCall = Unit | Complete


@dataclass
class Ledger:
    """The answers that have come in, by evaluation key; `needed` has the parts of what was not given up."""

    needed: dict[str, int] = field(default_factory=dict)
    parts: dict[str, list[Answers]] = field(default_factory=dict)

    def expect(self, units: Sequence[Unit]) -> None:
        """Note how many parts each evaluation has."""
        for unit in units:
            for _, evaluation in unit.jobs:
                self.needed[evaluation.key] = self.needed.get(evaluation.key, 0) + 1

    def put(self, unit: Unit, answers: Sequence[Answers]) -> list[Complete]:
        """Take a unit's answers; return the jobs that are complete now, with all their parts."""
        complete = []
        for job, answer in zip(unit.jobs, answers, strict=True):
            key = job[1].key
            if key not in self.needed:
                continue  # given up: another part of it failed
            self.parts.setdefault(key, []).append(answer)
            if len(self.parts[key]) == self.needed[key]:
                complete.append(Complete(job, self.parts.pop(key)))
        return complete

    def give_up(self, key: str) -> bool:
        """Forget an evaluation; return whether it was still expected."""
        self.parts.pop(key, None)
        return self.needed.pop(key, None) is not None


def evaluation_units(jobs: Sequence[Job], slots: int, pack: int | Literal["auto"]) -> list[Unit]:
    """Return the calls that answer all jobs, those of one backbone and task side by side."""
    most = TOGETHER if pack == "auto" else pack
    groups: dict[Hashable, list[list[Job]]] = {}
    for job in jobs:
        request, evaluation = job
        alike = (request.pack_key, request.config.manifest_digest, evaluation.model_copy(update={"trial": ""}).key)
        rows = groups.setdefault(evaluation.key if request.pack_key is None else alike, [[]])
        if len(rows[-1]) == most:
            rows.append([])
        rows[-1].append(job)
    packs = [tuple(pack) for rows in groups.values() for pack in rows]
    parts = max(1, -(-slots // len(packs))) if packs else 1
    planned = [Unit(pack, (i, parts)) for pack in packs for i in range(parts)]
    return sorted(planned, key=lambda unit: unit.resident)


class Calls:
    """The calls that are left of an evaluation.

    Args:
        jobs: what is scored.
        slots: how many evaluators there can be.
        pack: trials that answer together, at most.
        max_attempts: how often a call is made whose process dies.
    """

    def __init__(self, jobs: Sequence[Job], slots: int, pack: int | Literal["auto"], max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self._slots, self._pack = slots, pack
        self._waiting: list[EvaluatorCall] = []
        self._ledger = Ledger()
        self._deaths: Counter[Hashable] = Counter()  # by the key of the call
        self.slots = min(slots, self.add(jobs))

    def add(self, jobs: Sequence[Job]) -> int:
        """Plan the calls that answer more jobs, behind those that wait; return how many they are."""
        planned = evaluation_units(jobs, self._slots, self._pack)
        self._waiting[:0] = reversed(planned)
        self._ledger.expect(planned)
        return len(planned)

    def take(self) -> EvaluatorCall | None:
        """Return the next call, or None where none waits."""
        return self._waiting.pop() if self._waiting else None

    def put_back(self, call: EvaluatorCall) -> None:
        """Plan a call again that nobody has made."""
        self._waiting.append(call)

    def answered(self, unit: Unit, answers: Sequence[Answers]) -> None:
        """Take a unit's answers; what is complete with them is scored next."""
        self._waiting.extend(self._ledger.put(unit, answers))

    def failed(self, call: EvaluatorCall, *, died: bool) -> list[str]:
        """Plan a failed call again, or give its evaluations up and return their keys.

        A call whose process died is made again `max_attempts` times in all; one that raised would raise again. Where
        several trials answer together, each answers alone from then on, so that one in the way fails alone.
        """
        self._deaths[call.key] += died
        again = self._deaths[call.key] < self.max_attempts if died else len(call.jobs) > 1
        if again:
            self._waiting.extend([Unit((job,), call.part) for job in call.jobs] if isinstance(call, Unit) else [call])
            return []
        return [key for _, evaluation in call.jobs if self._ledger.give_up(key := evaluation.key)]
