"""`Tracker`: a sweep as one MLflow run with a child per trial. In this package alone is MLflow known.

Runs are found again by tag, so a resumed sweep goes on in the runs it began. Every call names its run; nothing
here touches MLflow's process-wide "active run".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.entities import Param, Run, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipeline.tracking import inputs, owner, showing, store
from pipeline.tracking.connection import StoreAway, pages
from pipeline.tracking.inputs import Input
from pipeline.tracking.reading import FAILED, FINISHED, KILLED, LAYOUT
from pipeline.tracking.reports import Reports
from pipeline.tracking.writing import MAX_PARAMS, Opened, chunks, text_of

__all__ = ["FAILED", "FINISHED", "KILLED", "Tracker", "code_tags"]

logger = logging.getLogger(__name__)
_END_STATES = (FINISHED, FAILED, KILLED)


class Tracker(Reports):
    """Keeps sweeps, trials and evaluations in one MLflow store.

    Args:
        uri: address of the store; None: MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml of the main checkout.
        root: the project's root.
        artifacts: where new experiments keep their files; None: mlartifacts beside params.yaml, or the server's place.

    Raises:
        InputError: `uri` is of no kind that MLflow can keep runs in.
    """

    # -- before anything runs ------------------------------------------------------------------------------------

    def prepare(self, studies: Sequence[str], notes: Mapping[str, str] | None = None) -> None:
        """Create the store and an experiment for each study; call it in one process, before any other opens it.

        Args:
            studies: their names.
            notes: what a study's experiment says of itself (markdown); a link to its table follows the first line.

        Raises:
            InputError: the store cannot be reached (said within seconds), or is of another MLflow version.
        """
        self._client  # noqa: B018 - opened, so that the tables exist also where there is no study yet
        for study in studies:
            experiment = self.experiment(study)
            if notes and study in notes:
                head, _, rest = notes[study].partition("\n")
                text = f"{head} ([as a table]({showing.table_link(experiment)}))\n{rest}"
                with self._talking():
                    known = self._client.get_experiment(experiment).tags
                    self._tag_experiment(experiment, showing.note_tags(known, text))

    def bring_up(self) -> None:
        """Let the experiments of an older store open as those that are made now."""
        sweeps = {run.info.experiment_id for run in self._search("tags.kind = 'sweep'")}
        with self._talking():
            for one in pages(self._client.search_experiments):
                if one.experiment_id in sweeps:
                    self._tag_experiment(one.experiment_id, showing.experiment_tags(one.tags))

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
            description: what the run's page says (markdown); a link to the study's report follows it.
            system_metrics: also log the machine's load while the run is open.

        Returns:
            The run's id.
        """
        key = str(tags.get("sweep_key", ""))
        found = self._find(study, {"kind": "sweep", "sweep_key": key})
        own = {"kind": "sweep", "sweep_key": key, "study": study}
        name = f"{study} {key[:6]}".strip()
        run_id = self._start(study, found, name=name, tags={**tags, **own}, parent=None)
        page = showing.report_link(self.experiment(study), run_id, study)
        known = found.data.tags if found else {}
        self.tag(run_id, showing.note_tags(known, f"{description}\n\n[Tables and figures]({page})", ours=True))
        self.log_provenance(run_id, self.provenance)
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
        datasets: Sequence[Input],
        tags: Mapping[str, Any],
        made_by: Mapping[str, Any] | None = None,
        description: str = "",
    ) -> str:
        """Open the child run of a trial: the one of the same key under the same parent if there is one.

        Args:
            study: name of the study.
            parent: id of the sweep's run.
            key: the trial's content key.
            name: what the run is called.
            params: what the number depends on; logged once, since MLflow lets no parameter change.
            datasets: the run's inputs.
            tags: further tags.
            made_by: provenance of the process that started the trial; None: of this one. A sweep that only finds
                a trial done must not put its own commit on it.
            description: what the run's page says (markdown); what leads on from it follows.

        Returns:
            The run's id.
        """
        code = made_by or self.provenance
        found = self._find(study, {"trial_key": key, "mlflow.parentRunId": parent})
        own = {"kind": "trial", "study": study, "trial_key": key, "mlflow.parentRunId": parent, **LAYOUT}
        run_id = self._start(study, found, name=name, tags={**code_tags(code), **tags, **own}, parent=parent)
        if found is None:
            self.log_provenance(run_id, code)
        known = found.data.params if found else {}
        new = [Param(name, text_of(value)) for name, value in params.items() if name not in known]
        text = showing.trial_text(self.experiment(study), parent, study, run_id, description)
        note = showing.note_tags(found.data.tags if found else {}, text) if description else {}
        used = found.inputs.dataset_inputs if found and found.inputs else []
        with self._talking():
            for chunk in chunks(new, MAX_PARAMS):
                self._client.log_batch(run_id, params=chunk)
            if note:
                self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in note.items()])
            if data := inputs.missing(used, datasets):
                self._client.log_inputs(run_id, data)
        return run_id

    def adopt(self, run_id: str) -> None:
        """Take on a run that another process opened, or of which it is not known what it has: ask the store."""
        with self._talking():
            steps = self._stored_steps(run_id)
            if run_id not in self._open:
                parent = self._client.get_run(run_id).data.tags.get("mlflow.parentRunId")
                self._open[run_id] = Opened(parent)
            self._open[run_id].steps = steps

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
            self._client.set_terminated(run_id, status, opened.ended)
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
            except StoreAway as error:
                logger.warning("MLflow runs could not be ended, which the next start will do: %s", error)
                return
            except Exception as error:  # the broad catch is meant: the others must be ended too
                logger.warning("MLflow run %s could not be ended: %s", run_id, error)

    def delete_runs(self, run_ids: Sequence[str]) -> None:
        """Put runs into MLflow's bin, from where they can be restored until `mlflow gc` empties it."""
        with self._talking():
            for run_id in run_ids:
                self._client.delete_run(run_id)

    # -- inside --------------------------------------------------------------------------------------------------

    def _start(self, study: str, found: Run | None, *, name: str, tags: Mapping[str, Any], parent: str | None) -> str:
        """Create or reopen a run as this process's own."""
        every = {name: text_of(value) for name, value in {**code_tags(self.provenance), **tags, **owner.tags()}.items()}
        with self._talking():
            if found is None:
                run_id = self._client.create_run(self.experiment(study), tags=every, run_name=name).info.run_id
                self._open[run_id] = Opened(parent)
            else:
                run_id = found.info.run_id
                if run_id not in self._open:
                    # a trial that finished is not trained again: what is added to its run takes none of its time
                    ended = found.info.end_time if parent and found.info.status == FINISHED else None
                    self._open[run_id] = Opened(parent, self._stored_steps(run_id), ended=ended)
                every.update(_earlier_commits(found.data.tags, every))
                self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in every.items()])
                self._client.update_run(run_id, status="RUNNING", name=name)
        return run_id


def code_tags(code: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tags that name a code version, given its provenance."""
    commit = {"mlflow.source.git.commit": code["commit"]} if code.get("commit") else {}
    dirty = "unknown" if code.get("dirty") is None else code["dirty"]
    note = {"git.note": code["note"]} if code.get("note") else {}
    return {**commit, **note, "git.dirty": dirty, "mlflow.source.name": "hificl", "mlflow.source.type": "LOCAL"}


def _earlier_commits(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return the tag that keeps the commits a resumed run was begun at, when the code has moved on since."""
    old = before.get("mlflow.source.git.commit")
    if not old or old == now.get("mlflow.source.git.commit"):
        return {}
    return {"git.earlier_commits": " ".join(dict.fromkeys([*before.get("git.earlier_commits", "").split(), old]))}
