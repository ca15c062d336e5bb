"""Scores in MLflow: each evaluation once with its trial's run, and what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.digests import folder_digest
from pipeline.sweep.inputs import scored_by
from pipeline.sweep.naming import trial_note
from pipeline.sweep.plan import Plan
from pipeline.sweep.store import TrialStore
from pipeline.tracking.spool import SpooledTracker
from pipeline.trial import TrialConfig

COSTS = ("trainable_parameters", "train_seconds", "train_flops", "peak_memory_bytes")  # of a trained trial


class Scores:
    """Logs evaluations; a store that goes away takes them later.

    Which run each trial has is asked for at once, before anything is scored.

    Args:
        tracker: the MLflow store.
        plan: the trials.
        store: the trial store.
        out: the folder of the evaluations.
    """

    def __init__(self, tracker: SpooledTracker, plan: Plan, store: TrialStore, out: Path) -> None:
        self.tracker, self.plan, self.store, self.out = tracker, plan, store, out
        self._logged = tracker.tracker.logged(set(store.all_keys()))

    def run_of(self, trial: str) -> str | None:
        """Return the newest run of a trial, where it has one."""
        runs = self._logged.get(trial)
        return runs[-1].run_id if runs else None

    def origin(self, trial: str) -> dict[str, Any]:
        """Return what a score was made from: the adapter's digest and the code that scored it."""
        code = {name: self.tracker.tracker.provenance[name] for name in ("commit", "dirty")}
        return {"adapter_digest": folder_digest(self.store.folder(trial) / "adapter"), "scored_by": code}

    def show(self, config: TrialConfig, evaluation: str) -> None:
        """Log an evaluation by its file with every run of its trial: scores, costs, samples and some answers.

        A run that has it already is left as it is.
        """
        lacking = [run.run_id for run in self._logged.get(config.key, []) if evaluation not in run.evaluations]
        if not lacking:
            return
        path = self.out / f"{evaluation}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        scores = {f"test_{name}": value for name, value in record["metrics"].items()}
        costs = {name: float(value) for name in COSTS if (value := getattr(self.store.done(config.key), name, None))}
        samples = scored_by(config, self.plan.places, record["evaluation"]["split"], record["num_samples"])
        for run_id in lacking:
            self.tracker.log_evaluation(run_id, {**scores, **costs}, path)
            self.tracker.log_answers(run_id, path, samples, trial_note(self.plan, config))
