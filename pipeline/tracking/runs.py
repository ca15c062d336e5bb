"""`Tracker`: a sweep as one MLflow run with a child per trial. Here and in `connection` alone is MLflow known.

Runs are found again by tag, so a resumed sweep goes on in the runs it began. Every call names its run; nothing
here touches MLflow's process-wide "active run".
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipeline.errors import InputError, WorkError
from pipeline.tracking import owner, store
from pipeline.tracking.connection import Connection, plain

logger = logging.getLogger(__name__)
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
_END_STATES = (FINISHED, FAILED, KILLED)
_MAX_METRICS, _MAX_PARAMS, _MAX_DIGEST = 1000, 100, 36  # MLflow's limits of one call, and of a digest's length


@dataclass
class _Open:
    """What is remembered of a run that this tracker has opened and not closed."""

    parent: str | None = None
    steps: set[tuple[str, int]] = field(default_factory=set)
    monitor: SystemMetricsMonitor | None = None


class Tracker(Connection):
    """Keeps sweeps, trials and evaluations in one MLflow store.

    Args:
        uri: address of the store; None: MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml of the main checkout.
        root: the project's root.

    Raises:
        InputError: `uri` is of no kind that MLflow can keep runs in.
    """

    def __init__(self, uri: str | None, root: Path | str) -> None:
        super().__init__(uri, root)
        self._open: dict[str, _Open] = {}

    # -- before anything runs ------------------------------------------------------------------------------------

    def prepare(self, studies: Sequence[str]) -> None:
        """Create the store and an experiment for each study; call it in one process, before any other opens it.

        Raises:
            InputError: the store cannot be reached (said within seconds), or is of another MLflow version.
        """
        self._client  # noqa: B018 - opened, so that the tables exist also where there is no study yet
        for study in studies:
            self.experiment(study)

    def sweep_leftovers(self) -> int:
        """End as KILLED what ended processes of this machine left RUNNING; return how many runs that were."""
        gone = [run for run in self._search("attributes.status = 'RUNNING'") if owner.is_gone(run.data.tags)]
        with self._talking():
            for run in gone:
                self._client.set_terminated(run.info.run_id, KILLED)
        return len(gone)

    # -- opening -------------------------------------------------------------------------------------------------

    def open_sweep(self, study: str, *, tags: Mapping[str, Any], description: str, system_metrics: bool = False) -> str:
        """Open the parent run of a sweep: the one with the same `tags["sweep_key"]` if there is one.

        Args:
            study: name of the study, which is the experiment.
            tags: further tags (`profile`, ...); `sweep_key` tells two sweeps of one study apart.
            description: what the run's page says (markdown).
            system_metrics: also log the machine's load while the run is open.

        Returns:
            The run's id.
        """
        key = str(tags.get("sweep_key", ""))
        found = self._find(study, {"kind": "sweep", "sweep_key": key})
        own = {"kind": "sweep", "sweep_key": key, "study": study, "mlflow.note.content": description}
        name = f"{study} {key[:6]}".strip()
        run_id = self._start(study, found, name=name, tags={**tags, **own}, parent=None)
        with self._talking():
            record = {k: v for k, v in self.provenance.items() if k != "diff"}
            self._client.log_dict(run_id, record, "provenance/provenance.json")
            if self.provenance["diff"]:
                self._client.log_text(run_id, self.provenance["diff"], "provenance/uncommitted.diff")
        if system_metrics:
            monitor = SystemMetricsMonitor(run_id, resume_logging=found is not None, tracking_uri=self.uri)
            monitor.start()
            self._open[run_id].monitor = monitor
        return run_id

    def open_trial(
        self,
        study: str,
        parent: str,
        *,
        key: str,
        name: str,
        params: Mapping[str, Any],
        datasets: Sequence[Mapping[str, str]],
        tags: Mapping[str, Any],
    ) -> str:
        """Open the child run of a trial: the one of the same key under the same parent if there is one.

        Args:
            study: name of the study.
            parent: id of the sweep's run.
            key: the trial's content key.
            name: what the run is called.
            params: what the number depends on; logged once, since MLflow lets no parameter change.
            datasets: the run's inputs, each with `name`, `source`, `digest` (DVC's) and `context`.
            tags: further tags.

        Returns:
            The run's id.
        """
        found = self._find(study, {"trial_key": key, "mlflow.parentRunId": parent})
        own = {"kind": "trial", "study": study, "trial_key": key, "mlflow.parentRunId": parent}
        run_id = self._start(study, found, name=name, tags={**tags, **own}, parent=parent)
        known = found.data.params if found else {}
        new = [Param(name, _text(value)) for name, value in params.items() if name not in known]
        with self._talking():
            for chunk in _chunks(new, _MAX_PARAMS):
                self._client.log_batch(run_id, params=chunk)
            if datasets and not (found and found.inputs and found.inputs.dataset_inputs):
                self._client.log_inputs(run_id, [_dataset(row) for row in datasets])
        return run_id

    # -- what is logged ------------------------------------------------------------------------------------------

    def log_epochs(self, run_id: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Log metrics by epoch in one call; what the run already has at an epoch is not logged again.

        Args:
            run_id: the trial's run.
            rows: one mapping per epoch, with `epoch` (the step) beside the metrics; None values are left out.
        """
        steps, now, new = self._steps(run_id), _now(), {}
        for row in rows:
            step = int(row["epoch"])
            for name, value in row.items():
                if name != "epoch" and value is not None and (name, step) not in steps:
                    new[name, step] = Metric(name, float(value), now, step)
        with self._talking():
            for chunk in _chunks(list(new.values()), _MAX_METRICS):
                self._client.log_batch(run_id, metrics=chunk)
                steps.update((metric.key, metric.step) for metric in chunk)

    def log_adapter(self, run_id: str, folder: Path | str) -> None:
        """Keep a trained adapter as the run's logged model; the same files are not kept twice.

        Args:
            run_id: the trial's run.
            folder: the adapter's folder (adapter_model.safetensors, adapter_config.json).

        Raises:
            WorkError: the folder is missing or empty.
        """
        folder = Path(folder)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if not files:
            raise WorkError("no adapter files", where=str(folder))
        content = hashlib.sha256()
        for file in files:
            content.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
        digest = content.hexdigest()
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
                if value is None or (before is not None and before.value == float(value)):
                    continue
                new.append(Metric(name, float(value), now, before.step + 1 if before else 0))
            for chunk in _chunks(new, _MAX_METRICS):
                self._client.log_batch(run_id, metrics=chunk)
            if file is not None:
                self._client.log_artifact(run_id, str(file), "evaluation")

    # -- closing -------------------------------------------------------------------------------------------------

    def close(self, run_id: str, status: str, error: str | None = None) -> None:
        """End a run; ending it again does nothing.

        Args:
            run_id: a run that this tracker opened.
            status: FINISHED, FAILED or KILLED.
            error: why it failed, kept as the tag `error`.
        """
        if status not in _END_STATES:
            raise ValueError(f"status {status!r} is none of {', '.join(_END_STATES)}")
        opened = self._open.get(run_id)
        if opened is None:
            return
        if opened.monitor is not None:
            opened.monitor.finish()
            opened.monitor = None
        with self._talking():
            if error is not None:
                self._client.set_tag(run_id, "error", error)
            self._client.set_terminated(run_id, status)
        del self._open[run_id]
        if opened.parent is None:
            store.checkpoint(self.uri)

    def close_all(self, status: str) -> None:
        """End everything that this tracker opened and has not closed, children first; never raises.

        Called on every way out, when there may be no store any more to speak to: what cannot be ended here is
        ended by `sweep_leftovers` at the next start.
        """
        for run_id in sorted(self._open, key=lambda one: self._open[one].parent is None):
            try:
                self.close(run_id, status)
            except Exception as error:  # the broad catch is meant: the others must be ended too
                logger.warning("MLflow run %s could not be ended: %s", run_id, error)

    # -- finding -------------------------------------------------------------------------------------------------

    def find_run(self, key: str) -> str | None:
        """Return the id of a trial's run by its key: a finished one before any other, the newest first."""
        runs = self._search(f"tags.trial_key = '{plain(key)}'")
        runs.sort(key=lambda run: (run.info.status == FINISHED, run.info.start_time, run.info.run_id))
        return runs[-1].info.run_id if runs else None

    def read_run(self, run_id: str) -> dict[str, Any]:
        """Return a run's own record: `params`, `tags`, `metrics` (last values), `datasets`, `status`, `study`.

        Raises:
            InputError: there is no such run in this store.
        """
        client = self._client
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            raise InputError(f"no run '{run_id}': {error.message}", where=store.shown(self.uri)) from None
        rows = run.inputs.dataset_inputs if run.inputs else []
        return {
            "run_id": run_id,
            "experiment_id": run.info.experiment_id,
            "status": run.info.status,
            "study": run.data.tags.get("study"),
            "params": dict(run.data.params),
            "tags": dict(run.data.tags),
            "metrics": dict(run.data.metrics),
            "datasets": [
                {
                    "name": row.dataset.name,
                    "digest": row.dataset.digest,
                    "source": row.dataset.source,
                    "context": next((tag.value for tag in row.tags if tag.key == "mlflow.data.context"), ""),
                }
                for row in rows
            ],
        }

    # -- inside --------------------------------------------------------------------------------------------------

    def _start(self, study: str, found: Run | None, *, name: str, tags: Mapping[str, Any], parent: str | None) -> str:
        """Create or reopen a run as this process's own."""
        every = {name: _text(value) for name, value in {**self._code_tags(), **tags, **owner.tags()}.items()}
        with self._talking():
            if found is None:
                run_id = self._client.create_run(self.experiment(study), tags=every, run_name=name).info.run_id
                self._open[run_id] = _Open(parent)
            else:
                run_id = found.info.run_id
                if run_id not in self._open:
                    self._open[run_id] = _Open(parent, self._stored_steps(run_id))
                every.update(_earlier_commits(found.data.tags, every))
                self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in every.items()])
                self._client.update_run(run_id, status="RUNNING", name=name)
        return run_id

    def _code_tags(self) -> dict[str, Any]:
        code = self.provenance
        commit = {"mlflow.source.git.commit": code["commit"]} if code["commit"] else {}
        dirty = "unknown" if code["dirty"] is None else code["dirty"]
        note = {"git.note": code["note"]} if code["note"] else {}
        return {**commit, **note, "git.dirty": dirty, "mlflow.source.name": "hificl", "mlflow.source.type": "LOCAL"}

    def _steps(self, run_id: str) -> set[tuple[str, int]]:
        if run_id not in self._open:  # opened by another process: nothing is remembered, so ask
            with self._talking():
                return self._stored_steps(run_id)
        return self._open[run_id].steps


def _earlier_commits(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return the tag that keeps the commits a resumed run was begun at, when the code has moved on since."""
    old = before.get("mlflow.source.git.commit")
    if not old or old == now.get("mlflow.source.git.commit"):
        return {}
    return {"git.earlier_commits": " ".join(dict.fromkeys([*before.get("git.earlier_commits", "").split(), old]))}


def _dataset(row: Mapping[str, str]) -> DatasetInput:
    # MLflow cuts off at 36 characters (an md5 has 32); the whole digest stands in the source
    source = json.dumps({"uri": row["source"], "digest": row["digest"]})
    dataset = Dataset(row["name"], row["digest"][:_MAX_DIGEST], "local", source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", row["context"])])


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _model_name(name: str) -> str:
    return "".join("-" if char in "/:.%\"'" else char for char in name)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _now() -> int:
    return time.time_ns() // 1_000_000
