"""Scores in MLflow: each evaluation once with its trial's run, and what is shown of it."""

from __future__ import annotations

from pipeline.digests import folder_digest
from pipeline.plan.plan import Plan
from pipeline.records.evaluation import CodeVersion, Evaluation
from pipeline.records.evaluations import Evaluations
from pipeline.sweep.inputs import scored_by
from pipeline.sweep.naming import trial_note
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
        evaluations: the scores.
    """

    def __init__(self, tracker: SpooledTracker, plan: Plan, store: TrialStore, evaluations: Evaluations) -> None:
        self.tracker, self.plan, self.store, self.evaluations = tracker, plan, store, evaluations
        self._logged = tracker.tracker.logged(set(store.all_keys()))

    def with_origin(self, evaluation: Evaluation) -> Evaluation:
        """Return a score with the newest run of its trial, the adapter's digest and the code that scored."""
        runs = self._logged.get(evaluation.trial)
        code = {name: self.tracker.tracker.provenance[name] for name in ("commit", "dirty")}
        return evaluation.model_copy(
            update={
                "run_id": runs[-1].run_id if runs else None, "scored_by": CodeVersion.model_validate(code),
                "adapter_digest": folder_digest(self.store.trial(evaluation.trial).adapter),
            }
        )  # fmt: skip

    def show(self, config: TrialConfig, evaluation: str) -> None:
        """Log an evaluation by its file with every run of its trial: scores, costs, samples and some answers.

        A run that has it already is left as it is.
        """
        lacking = [run.run_id for run in self._logged.get(config.key, []) if evaluation not in run.evaluations]
        if not lacking:
            return
        scored = self.evaluations.read(evaluation)
        scores = {f"test_{name}": value for name, value in scored.metrics.items() if value is not None}
        costs = {name: float(value) for name in COSTS if (value := getattr(self.store.done(config.key), name, None))}
        samples = scored_by(config, self.plan.places, str(scored.evaluation["split"]), scored.num_samples)
        for run_id in lacking:
            path = self.evaluations.path(evaluation)
            self.tracker.log_evaluation(run_id, {**scores, **costs}, path)
            self.tracker.log_answers(run_id, path, samples, trial_note(self.plan, config))
