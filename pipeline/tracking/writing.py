"""`Writer`: what is logged to a run that is open, once each."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModelOutput, Metric, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipeline.digests import folder_digest
from pipeline.errors import WorkError
from pipeline.rounding import rounded
from pipeline.tracking import answers, inputs, showing
from pipeline.tracking.inputs import Input
from pipeline.tracking.reading import DIFF, EVALUATIONS, LEDGER_FILE, PROVENANCE, Reader

_MAX_METRICS, MAX_PARAMS = 1000, 100  # MLflow's limits of one call
STEP_LOSS = "step/train_loss"  # a section of its own among the charts, beside the epochs' means in `train_loss`


@dataclass
class Opened:
    """What is remembered of a run that this tracker has opened and not closed."""

    parent: str | None = None
    steps: set[tuple[str, int]] = field(default_factory=set)
    monitor: SystemMetricsMonitor | None = None
    ended: int | None = None  # when it had ended before, in ms since 1970


class Writer(Reader):
    """Logs to runs; see `Connection` for the arguments."""

    def __init__(self, uri: str | None, root: Path | str, artifacts: str | None = None) -> None:
        super().__init__(uri, root, artifacts)
        self._open: dict[str, Opened] = {}

    def log_provenance(self, run_id: str, record: Mapping[str, Any]) -> None:
        """Keep a run's code version, versions and machine, and the diff of a dirty tree, as artifacts."""
        with self._talking():
            self._client.log_dict(run_id, {k: v for k, v in record.items() if k != "diff"}, PROVENANCE)
            if record.get("diff"):
                self._client.log_text(run_id, record["diff"], DIFF)

    def tag(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set tags of a run."""
        with self._talking():
            self._client.log_batch(run_id, tags=[RunTag(key, text_of(value)) for key, value in tags.items()])

    def log_epochs(
        self, run_id: str, rows: Sequence[Mapping[str, float]], at: int | None = None,
        losses: Sequence[tuple[int, float]] = (),
    ) -> None:  # fmt: skip
        """Log metrics by epoch in one call; what the run already has at an epoch is not logged again.

        Args:
            run_id: the trial's run.
            rows: one mapping per epoch, with `epoch` (the step) beside the metrics; None values are left out.
            at: when that was, in ms since 1970; None: now.
            losses: optimiser steps and the training loss there.
        """
        steps, now = self._steps(run_id), at or _now()
        points = [(name, int(row["epoch"]), value) for row in rows for name, value in row.items() if name != "epoch"]
        points += [(STEP_LOSS, step, value) for step, value in losses]
        new = {
            (name, step): Metric(name, rounded(value), now, step)
            for name, step, value in points
            if value is not None and (name, step) not in steps
        }
        with self._talking():
            for chunk in chunks(list(new.values()), _MAX_METRICS):
                self._client.log_batch(run_id, metrics=chunk)
                steps.update((metric.key, metric.step) for metric in chunk)

    def log_ledger(self, run_id: str, file: Path | str) -> None:
        """Keep a trial's metrics by epoch with all their digits, which are what a run that is made again must have."""
        with self._talking():
            self._client.log_artifact(run_id, str(file), str(Path(LEDGER_FILE).parent))

    def log_adapter(self, run_id: str, folder: Path | str) -> None:
        """Keep a trained adapter as the run's logged model; the same files are not kept twice.

        Args:
            run_id: the trial's run.
            folder: the adapter's folder (adapter_model.safetensors, adapter_config.json).

        Raises:
            WorkError: the folder is missing or empty.
        """
        folder = Path(folder)
        digest = folder_digest(folder)
        if digest is None:
            raise WorkError("no adapter files", where=str(folder))
        with self._talking():
            run = self._client.get_run(run_id)
            if run.data.tags.get("adapter_digest") == digest:
                return
            name = run.info.run_name.partition(" ")[0] or "adapter"
            model = self._client.create_logged_model(
                run.info.experiment_id,
                name=_model_name(name),
                source_run_id=run_id,
                model_type="adapter",
                tags={"trial_key": run.data.tags.get("trial_key", ""), "adapter_digest": digest},
            )
            self._client.log_model_artifacts(model.model_id, str(folder))
            self._client.finalize_logged_model(model.model_id, "READY")
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
            entries = {"adapter_digest": digest, "adapter_model_id": model.model_id}
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in entries.items()])

    def log_evaluation(self, run_id: str, metrics: Mapping[str, float], file: Path | str | None) -> None:
        """Log the scores of an evaluation and keep its file.

        A score that is already there is not logged again; a different one (another way of scoring) becomes the
        metric's next step, so that both stay and the newest is the one shown.

        Args:
            run_id: the trial's run; it may be closed.
            metrics: scores by name; None values are left out.
            file: the evaluation's file with the predictions, or None.
        """
        now, new = _now(), []
        with self._talking():
            last = {metric.key: metric for metric in self._client.get_run(run_id).data._metric_objs}
            for name, value in metrics.items():
                before = last.get(name)
                if value is None or (before is not None and rounded(before.value) == rounded(value)):
                    continue
                new.append(Metric(name, rounded(value), now, before.step + 1 if before else 0))
            for chunk in chunks(new, _MAX_METRICS):
                self._client.log_batch(run_id, metrics=chunk)
            if file is not None:
                self._client.log_artifact(run_id, str(file), "evaluation")

    def log_answers(self, run_id: str, file: Path | str, data: Input, description: str = "") -> None:
        """Show what an evaluation scored: its samples as an input, and a table of some answers with their pictures.

        Args:
            run_id: the trial's run; it may be closed.
            file: the evaluation's file, whose name is its key.
            data: the samples.
            description: what the run's page says where it says nothing yet (a run of before runs had descriptions).
        """
        file = Path(file)
        record = json.loads(file.read_text(encoding="utf-8"))
        with self._talking(), tempfile.TemporaryDirectory() as folder:
            run = self._client.get_run(run_id)
            if new := inputs.missing(run.inputs.dataset_inputs if run.inputs else [], [data]):
                self._client.log_inputs(run_id, new)
            table = answers.TAG if answers.write(record, self.root, Path(folder)) else {}
            self._client.log_artifacts(run_id, folder)
            keys = dict.fromkeys([*run.data.tags.get(EVALUATIONS, "").split(), file.stem])
            known, experiment = run.data.tags, run.info.experiment_id
            sweep, study = known.get("mlflow.parentRunId", ""), known.get("study", "")
            text = showing.trial_text(experiment, sweep, study, run_id, description)
            note = showing.note_tags(known, text) if description and showing.NOTE not in known else {}
            # last: what was cut off is logged again
            tags = {**showing.SCORED, **table, **note, EVALUATIONS: " ".join(keys)}
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _steps(self, run_id: str) -> set[tuple[str, int]]:
        if run_id not in self._open:  # opened by another process: nothing is remembered, so ask
            with self._talking():
                return self._stored_steps(run_id)
        return self._open[run_id].steps


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield `items` in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _model_name(name: str) -> str:
    return "".join("-" if char in "/:.%\"'" else char for char in name)


def text_of(value: Any) -> str:
    """Return a value as MLflow's params and tags hold it: a string as it is, else JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _now() -> int:
    return time.time_ns() // 1_000_000
