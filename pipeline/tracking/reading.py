"""`Reader`: runs found again, and what a run recorded of itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline.errors import InputError
from pipeline.tracking import store
from pipeline.tracking.connection import Connection, plain

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
PROVENANCE, DIFF = "provenance/provenance.json", "provenance/uncommitted.diff"
LEDGER_FILE = "ledger/metrics.jsonl"  # a trial's metrics by epoch, as its folder has them
EVALUATIONS = "evaluations"  # the tag that names those whose answers are logged
LAYOUT = {"mlflow.hificl.layout": "2"}  # of a trial's run; one of before has no description, step losses, inputs by use


@dataclass(frozen=True)
class Logged:
    """A run of a trial.

    Attributes:
        run_id: of the run.
        evaluations: keys of those whose answers it has.
    """

    run_id: str
    evaluations: frozenset[str]


class Reader(Connection):
    """Reads runs; see `Connection` for the arguments."""

    @property
    def address(self) -> str:
        """The store's address, without a password."""
        return store.shown(self.uri)

    def find_run(self, key: str) -> str | None:
        """Return the id of a trial's run by its key: a finished one before any other, the newest first."""
        runs = sorted(self._search(f"tags.trial_key = '{plain(key)}'"), key=_rank)
        return runs[-1].info.run_id if runs else None

    def logged(self, keys: Collection[str]) -> dict[str, list[Logged]]:
        """Return the runs of trials by key, one a sweep, in one search; the last is the one that `find_run` gives."""
        found: dict[str, list[Logged]] = {}
        for run in sorted(self._search("tags.kind = 'trial'") if keys else [], key=_rank):
            key = run.data.tags.get("trial_key", "")
            if key in keys:
                have = frozenset(run.data.tags.get(EVALUATIONS, "").split())
                found.setdefault(key, []).append(Logged(run.info.run_id, have))
        return found

    def trial_runs(self, keys: Collection[str]) -> list[str]:
        """Return the ids of all runs of the given trials, sorted."""
        runs = self._search("tags.kind = 'trial'") if keys else []
        return sorted(run.info.run_id for run in runs if run.data.tags.get("trial_key") in keys)

    def ended_trials(self, study: str, parent: str) -> dict[str, tuple[str, str]]:
        """Return status and adapter digest ("" without one) of a sweep's trials whose runs have ended, by key.

        A run of an older layout has things to come, so it counts as not ended.
        """
        query = f"tags.`mlflow.parentRunId` = '{plain(parent)}' and attributes.status != 'RUNNING'"
        found = {}
        for run in self._search(query, [self.experiment(study)]):
            tags = run.data.tags
            if tags.items() >= LAYOUT.items():
                found[tags.get("trial_key", "")] = (run.info.status, tags.get("adapter_digest", ""))
        return found

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

    def artifacts_of(self, run_id: str, folder: str) -> list[str]:
        """Return the paths of a run's artifacts in `folder`, sorted."""
        with self._talking():
            return sorted(one.path for one in self._client.list_artifacts(run_id, folder) if not one.is_dir)

    def read_artifact(self, run_id: str, path: str) -> str | None:
        """Return the text of a run's artifact, or None where the run has none at `path`."""
        if path not in self.artifacts_of(run_id, str(Path(path).parent)):
            return None
        with tempfile.TemporaryDirectory() as folder, self._talking():
            return Path(self._client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")

    def provenance_of(self, run_id: str) -> dict[str, Any]:
        """Return what a run recorded of its code, versions and machine, with the `diff` of a dirty tree.

        A run of before trials had a record of their own is answered for by its sweep's run.
        """
        parent = self.read_run(run_id)["tags"].get("mlflow.parentRunId")
        for one in (run_id, parent):
            text = self.read_artifact(one, PROVENANCE) if one else None
            if one and text is not None:
                return {**json.loads(text), "diff": self.read_artifact(one, DIFF) or ""}
        return {}


def _rank(run: Run) -> tuple[bool, int, str]:
    return run.info.status == FINISHED, run.info.start_time, run.info.run_id
