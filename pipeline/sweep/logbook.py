"""Keeps MLflow equal to the trial store: live while trials run, and by the ledger for those already done."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.plan.plan import Plan
from pipeline.records.epoch import EpochReport
from pipeline.sweep.inputs import used_by
from pipeline.sweep.messages import Watcher
from pipeline.sweep.naming import run_name, trial_note
from pipeline.sweep.store import TrialStore
from pipeline.tracking.runs import FAILED, FINISHED, KILLED
from pipeline.tracking.spool import SpooledTracker
from pipeline.trial import TrialConfig, canonical

POINTS = 200  # of a trial's losses in MLflow, where each takes 0.2 ms and 260 bytes
ENDS = {"finished": FINISHED, "diverged": FAILED, "failed": FAILED, "stopped": KILLED}


class Logbook(Watcher):
    """One MLflow child run a trial, below the parent of the study that asked for it first.

    Args:
        tracker: the MLflow store, which may be away.
        store: the trial store.
        plan: which trial belongs to which cell.
        parents: parent run by study.
    """

    def __init__(self, tracker: SpooledTracker, store: TrialStore, plan: Plan, parents: Mapping[str, str]) -> None:
        self.tracker, self.store, self.plan, self.parents = tracker, store, plan, parents
        self._several = len({one.backbone for one in plan.cells.values()}) > 1
        self._runs: dict[str, str] = {}

    def on_start(self, key: str) -> None:
        """Open the trial's run, or take the one that an earlier sweep began."""
        self._open(key)

    def on_report(self, key: str, report: EpochReport) -> None:
        """Log one epoch."""
        losses = {epoch: of_steps for epoch, of_steps in self.store.losses(key).items() if epoch == report.epoch}
        self.tracker.log_epochs(self._open(key), [_logged(report)], losses=self._curve(key, losses))

    def on_end(self, key: str, error: str | None) -> None:
        """Log what is missing and end the run."""
        self.record(key)

    def record(self, key: str) -> str:
        """Bring the run of a trial in line with the store; return its id."""
        run_id = self._open(key)
        rows = self.store.epochs(key)
        if rows:
            losses = self._curve(key, self.store.losses(key))
            self.tracker.log_epochs(run_id, [_logged(row) for row in rows], losses=losses)
        done = self.store.done(key)
        if done is not None:
            adapter = self.store.folder(key) / "adapter"
            if adapter.is_dir():
                self.tracker.log_adapter(run_id, adapter)
            if rows:
                self.tracker.log_ledger(run_id, self.store.trial(key).metrics)
            if done.packed is not None:
                self.tracker.tag(run_id, {"packed": done.packed})
            self.tracker.close(run_id, ENDS[done.status], done.error)
        return run_id

    def record_done(self, keys: Collection[str]) -> None:
        """Record trials that the store has done; those whose run says so already are passed over, a thousand at a look.

        A run ends as the last of what `record` does. KILLED is passed over by nobody: a crash ends a run so too.
        """
        known: dict[str, tuple[str, str]] = {}
        for study, parent in self.parents.items():
            known |= self.tracker.ended_trials(study, parent)
        for key in sorted(keys):
            end = self.store.done(key)
            ended = (ENDS[end.status], end.adapter_digest or "") if end is not None else ()
            if known.get(key) != ended or KILLED in ended:
                self.record(key)

    def _open(self, key: str) -> str:
        if key not in self._runs:
            config = self._config(key)
            cell = self.plan.cells[self.plan.cell_of[key]] if key in self.plan.cell_of else None
            study = cell.study if cell else next(iter(self.parents))
            self._runs[key] = self.tracker.open_trial(
                study,
                self.parents[study],
                key=key,
                name=run_name(cell, config, with_backbone=self._several) if cell else config.name,
                params=flat(config),
                datasets=used_by(config, self.plan.places),
                description=trial_note(self.plan, config),
                tags={
                    "profile": self.plan.params.profile,
                    "trial_config": canonical(config.model_dump(mode="json")),
                    "threads_per_worker": self.plan.params.sweep.threads_per_worker,
                    "pack": self.plan.params.sweep.pack,
                },
                made_by=self._made_by(key),
            )
        return self._runs[key]

    def _made_by(self, key: str) -> dict[str, Any] | None:
        """Return the provenance of a trial that is done already, where it is known."""
        origin = self.store.record(key).provenance
        return origin.model_dump() if origin.known and self.store.done(key) else None

    def _curve(self, key: str, losses: Mapping[int, Sequence[float]]) -> list[tuple[int, float]]:
        return curve(losses, self._config(key).epochs)

    def _config(self, key: str) -> TrialConfig:
        return self.plan.trials.get(key) or self.store.config(key)


def _logged(report: EpochReport) -> dict[str, float]:
    return {"epoch": report.epoch, **report.metrics}


def flat(config: TrialConfig) -> dict[str, Any]:
    """Return the configuration as MLflow params: the method's options beside the other fields, same names."""
    record = config.model_dump(mode="json")
    return {**{k: v for k, v in record.items() if k != "options"}, **record["options"]}


def curve(losses: Mapping[int, Sequence[float]], epochs: int) -> list[tuple[int, float]]:
    """Return steps and losses of a trial's curve: every step's, or the means of so many that about `POINTS` are left.

    Args:
        losses: of every step, by epoch.
        epochs: of the whole trial.
    """
    points = []
    for epoch, values in losses.items():
        together = -(-epochs * len(values) // POINTS)
        for start in range(0, len(values), together):
            some = values[start : start + together]
            points.append(((epoch - 1) * len(values) + start + len(some), sum(some) / len(some)))
    return points
