"""`hificl studies`: every study, its table or figure, and how far its trials are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, settable
from pipeline.core.errors import HificlError
from pipeline.core.terminal import GOOD, Answer, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.config.load import Params
    from pipeline.plan.inputs import Inputs


def register(line: CommandLine) -> None:
    """Add the verb."""
    settable(line.verb("look", "studies", studies, "every study, its trials done and open", answers=True))


def studies(args: argparse.Namespace) -> Overview:
    """Look at the current folder's."""
    from pipeline.config.load import load

    return overview(load(overrides=args.set))


@dataclass(frozen=True)
class State:
    """A study, and how many of its trials are done; `not_ready` says why they cannot be told.

    Attributes:
        title: what it is.
        paper: its table or figure (`hificl.table1_main`).
        in_profile: whether `dvc repro` runs it.
        trials: how many it has; None where it is not ready.
        done: of these.
        open: likewise.
        not_ready: why this profile cannot run it, or cannot yet.
    """

    title: str
    paper: str | None
    in_profile: bool
    trials: int | None = None
    done: int | None = None
    open: int | None = None
    not_ready: str | None = None


@dataclass(frozen=True)
class Overview(Answer):
    """The studies by name, under a profile."""

    profile: str
    studies: dict[str, State]

    def record(self) -> dict[str, Any]:
        """Return a study's fields by its name, those that it has."""
        always = ("title", "paper")
        return {
            name: {key: value for key, value in asdict(state).items() if value is not None or key in always}
            for name, state in self.studies.items()
        }

    def shown(self) -> Iterator[RenderableType]:
        """Give a row a study, those of the profile marked, and below why others have no trials here."""
        rows = table("study", "what it is", "done", "trials", right=("done", "trials"))
        for name, state in self.studies.items():
            whole = state.trials is not None and state.done == state.trials
            numbers = ["-" if count is None else str(count) for count in (state.done, state.trials)]
            mark = "*" if state.in_profile else " "
            rows.add_row(f"{mark} {name}", state.title, *numbers, style=GOOD if whole else "")
        yield rows
        yield f"\n* run by `dvc repro` under profile {self.profile}; any other by `hificl study NAME`"
        reasons: dict[str, list[str]] = {}
        for name, state in self.studies.items():
            if state.not_ready:
                reasons.setdefault(state.not_ready, []).append(name)
        for reason, names in reasons.items():
            yield f"- {', '.join(names) if len(names) < len(self.studies) else 'every study'}: {reason}"


def overview(params: Params) -> Overview:
    """Return how far the trials of every study are, under the current profile."""
    from pipeline.plan.inputs import Inputs, places

    inputs = Inputs(params, places())
    states = {
        name: State(study.title, study.paper, name in params.run.studies, **_counts(name, inputs))
        for name, study in params.studies.items()
    }
    return Overview(params.profile, states)


def _counts(study: str, inputs: Inputs) -> dict[str, Any]:
    from pipeline.plan.plan import make_plan
    from pipeline.plan.space import cells
    from pipeline.records.store import TrialStore

    try:
        plan = make_plan(inputs.params, cells(inputs.params, study, inputs.digests([study])), inputs.where)
        store = TrialStore(inputs.where.runs)
        done = sum(store.finished(key) for key in plan.trials)
    except HificlError as error:
        return {"not_ready": str(error)}
    return {"trials": len(plan.trials), "done": done, "open": len(plan.trials) - done}
