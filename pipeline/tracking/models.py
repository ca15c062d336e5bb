"""`Models`: the adapters that a study chose, as versions of a registered model a backbone, task and method."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.tracking.connection import pages
from pipeline.tracking.packaging import write_flavor
from pipeline.tracking.writing import Writer

BEST = "best"


@dataclass(frozen=True)
class Chosen:
    """A trained trial that stands for a cell of a study.

    Attributes:
        trial: its key.
        backbone: on which it was trained.
        task: on which it was trained.
        method: which method.
        objective: what it was chosen by, higher is better; None where there was nothing to choose by.
        protocol: objectives of one protocol (data, selection split, metric) can be compared.
    """

    trial: str
    backbone: str
    task: str
    method: str
    objective: float | None
    protocol: str

    @property
    def name(self) -> str:
        """The registered model's name; MLflow allows neither slash nor colon."""
        return f"{self.backbone}_{self.task}_{self.method}"


class Models(Writer):
    """Registers adapters; see `Connection` for the arguments."""

    def register(self, chosen: Iterable[Chosen]) -> int:
        """Make each chosen trial's logged model loadable and a version of its registered model; return how many.

        What is registered is left as it is. The alias `best` goes to the version with the highest objective under the
        protocol that is asked for.

        Args:
            chosen: trials; those without an adapter in the store are left out.
        """
        by_name: dict[str, dict[str, Chosen]] = {}
        for one in chosen:
            by_name.setdefault(one.name, {})[one.trial] = one
        known = {name: self._versions(name) for name in by_name}
        missing = {
            one.trial for name, group in by_name.items() for one in group.values() if one.trial not in known[name]
        }
        runs = self._adapter_runs(missing)
        for name, group in by_name.items():
            new = [one for one in group.values() if one.trial in runs and one.trial not in known[name]]
            for one in new:
                known[name][one.trial] = self._register(one, runs[one.trial], first=not known[name])
            self._point_at_best(name, next(iter(group.values())).protocol, known[name])
        return len(runs)

    def models_of(self, trials: Collection[str]) -> list[tuple[str, str]]:
        """Return (name, version) of the registered adapters of trials."""
        if not trials:
            return []
        with self._talking():
            found = list(pages(self._client.search_model_versions))
        return sorted((one.name, str(one.version)) for one in found if one.tags.get("trial_key") in trials)

    def delete_models(self, versions: Iterable[tuple[str, str]]) -> None:
        """Take versions out of the registry; an alias on one goes with it."""
        with self._talking():
            for name, version in versions:
                self._client.delete_model_version(name, version)

    def _adapter_runs(self, trials: set[str]) -> dict[str, Run]:
        """Return the run that keeps the adapter, by trial."""
        runs = self._search("tags.kind = 'trial'") if trials else []
        return {
            run.data.tags["trial_key"]: run
            for run in sorted(runs, key=lambda run: run.info.start_time)
            if run.data.tags.get("trial_key") in trials and "adapter_model_id" in run.data.tags
        }

    def _versions(self, name: str) -> dict[str, ModelVersion]:
        with self._talking():
            found = list(pages(self._client.search_model_versions, f"name = '{name}'"))
        return {version.tags.get("trial_key", ""): version for version in found}

    def _register(self, one: Chosen, run: Run, *, first: bool) -> ModelVersion:
        model_id = run.data.tags["adapter_model_id"]
        about = {"backbone": one.backbone, "task": one.task, "method": one.method, "trial": one.trial}
        with self._talking(), tempfile.TemporaryDirectory() as temporary:
            if first:
                self._made(one)
            flavor = Path(temporary) / "model"
            write_flavor(flavor, model_id=model_id, task=one.task, about=about)
            self._client.log_model_artifacts(model_id, str(flavor))
            objective = "" if one.objective is None else repr(one.objective)
            with _process_wide(self.uri):
                return self._client.create_model_version(
                    one.name, f"models:/{model_id}", run.info.run_id, model_id=model_id,
                    tags={"trial_key": one.trial, "objective": objective, "protocol": one.protocol},
                    description=f"{run.info.run_name}, `hificl predict --adapter runs/{one.trial}/adapter`",
                )  # fmt: skip

    def _made(self, one: Chosen) -> None:
        text = f"{one.method} on {one.backbone} for {one.task}; `{BEST}` has the highest score on the selection split."
        try:
            self._client.create_registered_model(one.name, description=text)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _point_at_best(self, name: str, protocol: str, versions: dict[str, ModelVersion]) -> None:
        fit = [one for one in versions.values() if one.tags.get("protocol") == protocol and one.tags.get("objective")]
        if not fit:
            return
        best = max(fit, key=lambda one: (float(one.tags["objective"]), -int(one.version)))
        with self._talking():
            if self._client.get_registered_model(name).aliases.get(BEST) != str(best.version):
                self._client.set_registered_model_alias(name, BEST, str(best.version))


@contextmanager
def _process_wide(uri: str) -> Iterator[None]:
    """Let MLflow's process-wide address be `uri`: a database's registry looks a model up there, not in itself."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # nothing in this package sets it
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
