"""Whether the engine that a trial is trained with is on this machine, asked before anything is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from pipeline.errors import InputError
from pipeline.plan.plan import Plan
from pipeline.sweep.store import TrialStore
from pipeline.trial import TrialConfig


def check_engines(trials: Iterable[TrialConfig]) -> str:
    """Return which engines train the trials.

    Raises:
        InputError: DeepSpeed is asked for and not there; it is installed on Linux alone.
    """
    asked = [trial.engine for trial in trials if trial.trained]
    if "deepspeed" in asked and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"{asked.count('deepspeed')} trials ask for ZeRO, offload or the engine deepspeed, and DeepSpeed, "
            "which is for Linux, is not installed", where="train",
            way_out="Set train.zero_stage to 0, train.offload to none and train.engine to auto; or make setup on Linux",
        )  # fmt: skip
    return ", ".join(f"{asked.count(name)} trained by {name}" for name in sorted(set(asked)))


def check_open(plan: Plan, store: TrialStore) -> None:
    """Check the engine of every trial that is not done.

    Raises:
        InputError: see `check_engines`.
    """
    check_engines([*(plan.trials[key] for key in plan.open_keys(store.finished)), *plan.examples])
