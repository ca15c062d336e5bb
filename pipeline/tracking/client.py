"""`Tracker`: the client of one MLflow store. In this package alone is MLflow known.

A sweep is a run with a child a trial. Runs are found again by tag, so a resumed sweep goes on in the runs it began.
Every call names its run; nothing here touches MLflow's process-wide "active run".
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from pipeline.core.copies import main_checkout
from pipeline.core.errors import InputError
from pipeline.core.progress import say
from pipeline.records.evaluation import Evaluation
from pipeline.records.trial import Provenance
from pipeline.tracking import page, store
from pipeline.tracking import records as answers
from pipeline.tracking.provenance import code_tags, earlier_commits, process_is_gone, process_tags, provenance
from pipeline.tracking.records import (
    EVALUATIONS,
    FAILED,
    FINISHED,
    KILLED,
    LoggedRun,
    MetricPoint,
    RunInput,
    TrialRunStart,
    chunks,
    missing_inputs,
    pages,
    plain,
    rounded,
    text_of,
)
from pipeline.tracking.store import StoreAway

for _name in ("alembic", "mlflow.system_metrics", "mlflow.store.db"):
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a retry is no news: what comes of it is said
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its tracebacks are of errors that it raises too
logger = logging.getLogger(__name__)

PROVENANCE, DIFF = "provenance/provenance.json", "provenance/uncommitted.diff"
LEDGER_FILE = "ledger/metrics.jsonl"  # a trial's metrics by epoch, as its folder has them
LAYOUT = {"mlflow.hificl.layout": "2"}  # of a trial's run; an older one lacks description, step losses, inputs by use
_MAX_METRICS, _MAX_PARAMS = 1000, 100  # MLflow's limits of one call


@dataclass
class _Open:
    """What is remembered of a run that this tracker has opened and not closed."""

    parent: str | None
    steps: set[tuple[str, int]] | None  # that the store has; None: that is not known
    ended: int | None = None  # when it had ended before, in ms since 1970
    monitor: SystemMetricsMonitor | None = None


class Tracker:
    """Keeps sweeps, trials and evaluations in one MLflow store, which is opened at its first use.

    Args:
        uri: address of the store; None: MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml of the main checkout.
        root: the project's root.
        artifacts: where new experiments keep their files (a folder, or s3://bucket/path); None: mlartifacts beside
            params.yaml, or what a tracking server chooses.

    Raises:
        InputError: `uri` is of no kind that MLflow can keep runs in.
    """

    def __init__(self, uri: str | None, root: Path | str, artifacts: str | None = None) -> None:
        self.root = Path(root).resolve()
        home = main_checkout(self.root)
        self.uri = store.resolve_address(uri or os.environ.get("MLFLOW_TRACKING_URI") or None, home)
        if artifacts is None and store.is_database(self.uri):
            artifacts = str(home / "mlartifacts")
        self.artifacts = artifacts and (artifacts if "://" in artifacts else (home / artifacts).resolve().as_uri())
        self._experiments: dict[str, str] = {}
        self._open: dict[str, _Open] = {}

    @property
    def address(self) -> str:
        """The store's address, without a password."""
        return store.shown(self.uri)

    @cached_property
    def provenance(self) -> Provenance:
        """Code version, package versions, machine and data digests, read once."""
        return provenance(self.root)

    @cached_property
    def mlflow(self) -> MlflowClient:
        """MLflow's own client; call it inside `talking`.

        Raises:
            InputError: the store cannot be reached (said within seconds), or is of another MLflow version.
        """
        with store.talking(self.uri, InputError), store.creation_lock(self.uri):
            store.probe(self.uri)
            if store.sqlite_file(self.uri) is not None:
                store.tune_sqlite()
            client = MlflowClient(self.uri)
            client.search_experiments(max_results=1)  # the first call creates the tables
            file = store.sqlite_file(self.uri)
            for line in store.follow_moved(file, self.artifacts) if file and self.artifacts else ():
                say(f"note: {line}")
        return client

    @contextmanager
    def talking(self) -> Iterator[MlflowClient]:
        """Give MLflow's own client; what the store can answer with becomes the project's own error.

        Raises:
            StoreAway: it does not answer or cannot write.
            WorkError: it refuses.
        """
        client = self.mlflow
        with store.talking(self.uri):
            yield client

    # -- experiments -------------------------------------------------------------------------------------------------

    def prepare(self, studies: Sequence[str], notes: Mapping[str, str] | None = None) -> None:
        """Create the store and an experiment for each study; call it in one process, before any other opens it.

        Args:
            studies: their names.
            notes: what a study's experiment says of itself (Markdown); a link to its table follows the first line.

        Raises:
            InputError: the store cannot be reached (said within seconds), or is of another MLflow version.
        """
        self.mlflow  # noqa: B018 - opened, so that the tables exist also where there is no study yet
        for study in studies:
            experiment = self.experiment(study)
            if notes and study in notes:
                head, _, rest = notes[study].partition("\n")
                text = f"{head} ([as a table]({page.table_link(experiment)}))\n{rest}"
                with self.talking() as client:
                    self._tag_experiment(experiment, page.note_tags(client.get_experiment(experiment).tags, text))

    def experiment(self, study: str) -> str:
        """Return the id of a study's experiment, which is made, or brought back from deletion, when needed."""
        if study not in self._experiments:
            with self.talking() as client, store.creation_lock(self.uri):
                known = client.get_experiment_by_name(study)
                if known is None:
                    location = f"{self.artifacts.rstrip('/')}/{study}" if self.artifacts else None
                    experiment = client.create_experiment(study, artifact_location=location)
                else:
                    experiment = known.experiment_id
                    if known.lifecycle_stage != "active":
                        client.restore_experiment(experiment)
                self._tag_experiment(experiment, page.experiment_tags(known.tags if known else {}))
            self._experiments[study] = experiment
        return self._experiments[study]

    def bring_up(self) -> None:
        """Let the experiments of an older store open as those that are made now."""
        sweeps = {run.experiment_id for run in self.search("tags.kind = 'sweep'")}
        with self.talking() as client:
            for experiment in pages(client.search_experiments):
                if experiment.experiment_id in sweeps:
                    self._tag_experiment(experiment.experiment_id, page.experiment_tags(experiment.tags))

    def _tag_experiment(self, experiment: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.mlflow.set_experiment_tag(experiment, key, value)

    # -- finding and reading -----------------------------------------------------------------------------------------

    def search(self, query: str, experiments: list[str] | None = None) -> list[LoggedRun]:
        """Return the runs that a filter of MLflow's gives, in some experiments or, where these are None, in all."""
        with self.talking() as client:
            if experiments is None:
                experiments = [experiment.experiment_id for experiment in pages(client.search_experiments)]
            runs = pages(client.search_runs, experiments, query, ViewType.ACTIVE_ONLY)
            return [LoggedRun.of(run) for run in runs]

    def read_run(self, run_id: str) -> LoggedRun:
        """Return a run.

        Raises:
            InputError: there is no such run in this store.
        """
        client = self.mlflow
        try:
            return LoggedRun.of(client.get_run(run_id))
        except MlflowException as error:
            problem, way_out = f"no run '{run_id}': {error.message}", "`hificl trace` names a number's runs"
            raise InputError(problem, where=self.address, way_out=way_out) from None

    def find_run(self, key: str) -> str | None:
        """Return the id of a trial's run by its key: a finished one before any other, the newest first."""
        runs = self.search(f"tags.trial_key = '{plain(key)}'")
        return max(runs, key=lambda run: run.rank).run_id if runs else None

    def runs_of(self, keys: Collection[str]) -> dict[str, list[LoggedRun]]:
        """Return the runs of trials by key, one a sweep, in one search; the last is the one that `find_run` gives."""
        runs: dict[str, list[LoggedRun]] = {}
        for run in sorted(self.search("tags.kind = 'trial'") if keys else [], key=lambda run: run.rank):
            if run.trial_key in keys:
                runs.setdefault(run.trial_key, []).append(run)
        return runs

    def ended_trials(self, study: str, parent: str) -> dict[str, LoggedRun]:
        """Return a sweep's trials whose runs have ended, by key.

        A run of an older layout has things to come, so it counts as not ended.
        """
        query = f"tags.`mlflow.parentRunId` = '{plain(parent)}' and attributes.status != 'RUNNING'"
        runs = self.search(query, [self.experiment(study)])
        return {run.trial_key: run for run in runs if run.tags.items() >= LAYOUT.items()}

    def find_sweep(self, study: str, key: str) -> LoggedRun | None:
        """Return the parent run of a sweep by its `sweep_key`."""
        return self._find(study, {"kind": "sweep", "sweep_key": key})

    def artifacts_of(self, run_id: str, folder: str) -> list[str]:
        """Return the paths of a run's artifacts in `folder`, sorted."""
        with self.talking() as client:
            return sorted(entry.path for entry in client.list_artifacts(run_id, folder) if not entry.is_dir)

    def read_artifact(self, run_id: str, path: str) -> str | None:
        """Return the text of a run's artifact, or None where the run has none at `path`."""
        if path not in self.artifacts_of(run_id, str(Path(path).parent)):
            return None
        with tempfile.TemporaryDirectory() as folder, self.talking() as client:
            return Path(client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")

    def provenance_of(self, run_id: str) -> Provenance:
        """Return what a run recorded of its code, versions and machine, with the `diff` of a dirty tree.

        A run from before trials had a record of their own is answered for by its sweep's run.

        Raises:
            InputError: the record is damaged.
        """
        for recorded in filter(None, (run_id, self.read_run(run_id).parent)):
            text = self.read_artifact(recorded, PROVENANCE)
            if text is not None:
                origin = Provenance.parse(text, f"{recorded} {PROVENANCE}", "Give another run")
                return origin.model_copy(update={"diff": self.read_artifact(recorded, DIFF) or ""})
        return Provenance()

    def _find(self, study: str, tags: Mapping[str, str]) -> LoggedRun | None:
        query = " and ".join(f"tags.`{key}` = '{plain(value)}'" for key, value in tags.items() if value)
        runs = self.search(query, [self.experiment(study)])
        runs = [run for run in runs if all(run.tags.get(key, "") == value for key, value in tags.items())]
        return min(runs, key=lambda run: (run.start_time, run.run_id)) if runs else None

    # -- opening -----------------------------------------------------------------------------------------------------

    def open_sweep(
        self, study: str, *, tags: Mapping[str, object], description: str, system_metrics: bool = False
    ) -> str:
        """Open the parent run of a sweep: the one with the same `tags["sweep_key"]` if there is one.

        Args:
            study: name of the study, which is the experiment.
            tags: further tags (`profile`, ...); `sweep_key` tells two sweeps of one study apart.
            description: what the run's page says (Markdown); a link to the study's report follows it.
            system_metrics: also log the machine's load while the run is open.

        Returns:
            The run's id.
        """
        key = str(tags.get("sweep_key", ""))
        known = self.find_sweep(study, key)
        identity = {"kind": "sweep", "sweep_key": key, "study": study}
        run_id = self._start(study, known, name=f"{study} {key[:6]}".strip(), tags={**tags, **identity}, parent=None)
        report = page.report_link(self.experiment(study), run_id, study)
        note = f"{description}\n\n[Tables and figures]({report})"
        self.tag(run_id, page.note_tags(known.tags if known else {}, note, ours=True))
        self._log_provenance(run_id, self.provenance)
        if system_metrics:
            monitor = SystemMetricsMonitor(run_id, resume_logging=known is not None, tracking_uri=self.uri)
            monitor.start()
            self._open[run_id].monitor = monitor
        return run_id

    def open_trial(self, study: str, parent: str, trial: TrialRunStart) -> str:
        """Open the child run of a trial: the one of the same key under the same parent if there is one.

        Returns:
            The run's id.
        """
        code = trial.made_by or self.provenance
        known = self._find(study, {"trial_key": trial.key, "mlflow.parentRunId": parent})
        identity = {"kind": "trial", "study": study, "trial_key": trial.key, "mlflow.parentRunId": parent, **LAYOUT}
        tags = {**code_tags(code), **trial.tags, **identity}
        run_id = self._start(study, known, name=trial.name, tags=tags, parent=parent)
        if known is None:
            self._log_provenance(run_id, code)
        old = known.params if known else {}
        new = [Param(name, text_of(value)) for name, value in trial.params.items() if name not in old]
        note: dict[str, str] = {}
        if trial.description:
            text = page.trial_text(self.experiment(study), parent, study, run_id, trial.description)
            note = page.note_tags(known.tags if known else {}, text)
        with self.talking() as client:
            for chunk in chunks(new, _MAX_PARAMS):
                client.log_batch(run_id, params=chunk)
            if inputs := missing_inputs(known.inputs if known else (), trial.inputs):
                client.log_inputs(run_id, inputs)
        self.tag(run_id, note)
        return run_id

    def _start(
        self, study: str, known: LoggedRun | None, *, name: str, tags: Mapping[str, object], parent: str | None
    ) -> str:
        """Create or reopen a run as this process's own."""
        every = {key: text_of(value) for key, value in {**code_tags(self.provenance), **tags, **process_tags()}.items()}
        with self.talking() as client:
            if known is None:
                run_id = client.create_run(self.experiment(study), tags=every, run_name=name).info.run_id
                self._open[run_id] = _Open(parent, set())
            else:
                run_id = known.run_id
                if run_id not in self._open:
                    # a trial that finished is not trained again: what is added to its run takes none of its time
                    ended = known.end_time if parent and known.status == FINISHED else None
                    self._open[run_id] = _Open(parent, None, ended)
                every.update(earlier_commits(known.tags, every))
                client.log_batch(run_id, tags=[RunTag(key, value) for key, value in every.items()])
                client.update_run(run_id, status="RUNNING", name=name)
        return run_id

    # -- logging -----------------------------------------------------------------------------------------------------

    def tag(self, run_id: str, tags: Mapping[str, object]) -> None:
        """Set tags of a run."""
        if tags:
            with self.talking() as client:
                client.log_batch(run_id, tags=[RunTag(key, text_of(value)) for key, value in tags.items()])

    def log_metrics(self, run_id: str, points: Iterable[MetricPoint]) -> None:
        """Log values by step in as few calls as MLflow allows; what the run already has at a step is left as it is."""
        now = time.time_ns() // 1_000_000
        opened = self._open.get(run_id)
        steps = opened.steps if opened else None
        if steps is None:
            steps = self._stored_steps(run_id)
            if opened:
                opened.steps = steps
        new = {
            (point.name, point.step): Metric(point.name, rounded(point.value), now, point.step)
            for point in points
            if point.value is not None and (point.name, point.step) not in steps
        }
        with self.talking() as client:
            for chunk in chunks(list(new.values()), _MAX_METRICS):
                client.log_batch(run_id, metrics=chunk)
                steps.update((metric.key, metric.step) for metric in chunk)

    def log_ledger(self, run_id: str, file: Path) -> None:
        """Keep a trial's metrics by epoch with all their digits, which are what a run that is made again must have."""
        with self.talking() as client:
            client.log_artifact(run_id, str(file), str(Path(LEDGER_FILE).parent))

    def log_scores(self, run_id: str, scores: Mapping[str, float | None], file: Path | None = None) -> None:
        """Log numbers that have no step of their own, and keep the file that they stand in.

        A number that is already there is not logged again; a different one (another way of scoring) becomes the
        metric's next step, so that both stay and the newest is the one shown.

        Args:
            run_id: the run; it may be closed.
            scores: by name; None values are left out.
            file: the evaluation's file with the predictions, or None.
        """
        now, new = time.time_ns() // 1_000_000, []
        with self.talking() as client:
            run = LoggedRun.of(client.get_run(run_id))
            for name, value in scores.items():
                before = run.metrics.get(name)
                if value is None or (before is not None and rounded(before) == rounded(value)):
                    continue
                new.append(Metric(name, rounded(value), now, run.metric_steps[name] + 1 if before is not None else 0))
            for chunk in chunks(new, _MAX_METRICS):
                client.log_batch(run_id, metrics=chunk)
            if file is not None:
                client.log_artifact(run_id, str(file), "evaluation")

    def log_answers(self, run_id: str, file: Path, data: RunInput, description: str = "") -> None:
        """Show what an evaluation scored: its samples as an input, and a table of some answers with their pictures.

        Args:
            run_id: the trial's run; it may be closed.
            file: the evaluation's file, whose name is its key.
            data: the samples.
            description: what the run's page says where it says nothing yet (an older run had no description).
        """
        evaluation = Evaluation.read(file, "Remove the file and run dvc repro evaluate again")
        with self.talking() as client, tempfile.TemporaryDirectory() as folder:
            run = LoggedRun.of(client.get_run(run_id))
            if inputs := missing_inputs(run.inputs, [data]):
                client.log_inputs(run_id, inputs)
            table = answers.TAG if answers.write_answers(evaluation.predictions, self.root, Path(folder)) else {}
            client.log_artifacts(run_id, folder)
        note: dict[str, str] = {}
        if description and page.NOTE not in run.tags:
            text = page.trial_text(run.experiment_id, run.parent or "", run.study, run_id, description)
            note = page.note_tags(run.tags, text)
        self.mark_logged(run_id, file, {**page.SCORED, **table, **note})  # last: what was cut off is logged again

    def mark_logged(self, run_id: str, file: Path, tags: Mapping[str, str] | None = None) -> None:
        """Note with a run that it has all of an evaluation or measurement, by the name of its file."""
        known = self.read_run(run_id).tags.get(EVALUATIONS, "").split()
        self.tag(run_id, {**(tags or {}), EVALUATIONS: " ".join(dict.fromkeys([*known, file.stem]))})

    def _log_provenance(self, run_id: str, record: Provenance) -> None:
        """Keep a run's code version, versions and machine, and the diff of a dirty tree, as artifacts."""
        with self.talking() as client:
            client.log_dict(run_id, record.model_dump(exclude={"diff"}), PROVENANCE)
            if record.diff:
                client.log_text(run_id, record.diff, DIFF)

    def _stored_steps(self, run_id: str) -> set[tuple[str, int]]:
        with self.talking() as client:
            names = [name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")]
            return {(name, metric.step) for name in names for metric in client.get_metric_history(run_id, name)}

    # -- closing -----------------------------------------------------------------------------------------------------

    def close(self, run_id: str, status: str, error: str | None = None) -> None:
        """End a run as FINISHED, FAILED or KILLED, with the tag `error`; ending it again does nothing."""
        if status not in (FINISHED, FAILED, KILLED):
            raise ValueError(f"status {status!r} is none of {FINISHED}, {FAILED}, {KILLED}")
        opened = self._open.get(run_id)
        if opened is None:
            return
        if opened.monitor is not None:
            opened.monitor.finish()
            opened.monitor = None
        with self.talking() as client:
            if error is not None:
                client.set_tag(run_id, "error", error)
            client.set_terminated(run_id, status, opened.ended)
        del self._open[run_id]
        if opened.parent is None:
            store.checkpoint(self.uri)

    def close_all(self, status: str) -> None:
        """End everything that this tracker opened and has not closed, children first; never raises.

        Called on every way out, when there may be no store any more to speak to: what cannot be ended here is
        ended by `end_leftovers` at the next start.
        """
        for run_id in sorted(self._open, key=lambda run_id: self._open[run_id].parent is None):
            try:
                self.close(run_id, status)
            except StoreAway as error:
                logger.warning("MLflow runs could not be ended, which the next start will do: %s", error)
                return
            except Exception as error:  # the broad catch is meant: the others must be ended too
                logger.warning("MLflow run %s could not be ended: %s", run_id, error)

    def forget_steps(self) -> None:
        """Ask the store anew which steps it has: a call that failed may have been carried out all the same."""
        for opened in self._open.values():
            opened.steps = None

    def end_leftovers(self) -> int:
        """End as KILLED what ended processes of this machine left RUNNING; return how many runs that were."""
        gone = [run for run in self.search("attributes.status = 'RUNNING'") if process_is_gone(run.tags)]
        with self.talking() as client:
            for run in gone:
                client.set_terminated(run.run_id, KILLED)
        return len(gone)

    def delete_runs(self, run_ids: Sequence[str]) -> None:
        """Put runs into MLflow's bin, from where they can be restored until `mlflow gc` empties it."""
        with self.talking() as client:
            for run_id in run_ids:
                client.delete_run(run_id)
