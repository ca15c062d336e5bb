"""`ModelRegistry`: the adapters that a study chose, as versions of a registered model a backbone, task and method."""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from PIL import Image

from pipeline import LIBRARY, as_library
from pipeline.core.errors import WorkError
from pipeline.core.files import folder_digest
from pipeline.core.registry import extensions
from pipeline.tasks import tasks
from pipeline.tracking.client import Tracker
from pipeline.tracking.provenance import head_commit
from pipeline.tracking.records import LoggedRun, pages

BEST = "best"
CODE = Path(__file__).with_name("served.py")
HOME = Path(__file__).parents[1]
_ROOMS = (
    "adapters", "attention", "backbones", "baselines", "config", "core", "data", "evaluate", "prompts", "records",
    "resident", "scores", "tasks",
)  # fmt: skip
# what these import to answer; torchvision for processors with a video part
_NEEDED = (
    "torch", "torchvision", "transformers", "tokenizers", "safetensors", "pydantic", "numpy", "pillow", "ruamel.yaml",
    "ruamel.yaml.clib", "peft", "mlflow",
)  # fmt: skip
_QUANTIZED = "bitsandbytes"
_EXAMPLE_SIDE = 32  # pixels

for _name in ("mlflow.pyfunc", "mlflow.models.model"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True)
class ModelCandidate:
    """A trained trial that stands for a cell of a study.

    Attributes:
        trial: its key.
        backbone: on which it was trained.
        task: on which it was trained.
        method: which method.
        objective: what it was chosen by, higher is better; None where there was nothing to choose by.
        protocol: objectives of one protocol (data, selection split, metric) can be compared.
        quantized: whether the backbone's weights are in few bits.
    """

    trial: str
    backbone: str
    task: str
    method: str
    objective: float | None
    protocol: str
    quantized: bool = False

    @property
    def name(self) -> str:
        """The registered model's name; MLflow allows neither slash nor colon."""
        return re.sub("[/:]", "-", f"{self.backbone}_{self.task}_{self.method}")


class ModelRegistry:
    """Registers adapters whose runs are in a store."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def register(self, candidates: Iterable[ModelCandidate]) -> int:
        """Make each candidate's logged model loadable and a version of its registered model; return how many.

        What is registered is left as it is. The alias `best` goes to the version with the highest objective under the
        protocol that is asked for.

        Args:
            candidates: trials; those without an adapter in the store are left out.
        """
        by_name: dict[str, dict[str, ModelCandidate]] = {}
        for candidate in candidates:
            by_name.setdefault(candidate.name, {})[candidate.trial] = candidate
        known = {name: self._versions(name) for name in by_name}
        runs = self._adapter_runs({trial for name, group in by_name.items() for trial in group.keys() - known[name]})
        for name, group in by_name.items():
            versions = known[name]
            for trial, candidate in group.items():
                if trial in runs and trial not in versions:
                    versions[trial] = self._register(candidate, runs[trial], first=not versions)
            self._point_at_best(name, next(iter(group.values())).protocol, versions.values())
        return len(runs)

    def models_of(self, trials: Collection[str]) -> list[tuple[str, str]]:
        """Return (name, version) of the registered adapters of trials."""
        if not trials:
            return []
        with self.tracker.talking() as client:
            versions = list(pages(client.search_model_versions))
        return sorted(
            (version.name, str(version.version)) for version in versions if version.tags.get("trial_key") in trials
        )

    def delete(self, versions: Iterable[tuple[str, str]]) -> None:
        """Take versions out of the registry; an alias on one goes with it."""
        with self.tracker.talking() as client:
            for name, version in versions:
                client.delete_model_version(name, version)

    def _adapter_runs(self, trials: set[str]) -> dict[str, LoggedRun]:
        """Return the run that keeps the adapter, by trial."""
        runs = self.tracker.search("tags.kind = 'trial'") if trials else []
        return {
            run.trial_key: run
            for run in sorted(runs, key=lambda run: run.start_time)
            if run.trial_key in trials and "adapter_model_id" in run.tags
        }

    def _versions(self, name: str) -> dict[str, ModelVersion]:
        with self.tracker.talking() as client:
            versions = list(pages(client.search_model_versions, f"name = '{name}'"))
        return {version.tags.get("trial_key", ""): version for version in versions}

    def _register(self, candidate: ModelCandidate, run: LoggedRun, *, first: bool) -> ModelVersion:
        model_id = run.tags["adapter_model_id"]
        about = {"backbone": candidate.backbone, "task": candidate.task, "method": candidate.method}
        about["trial"] = candidate.trial
        with self.tracker.talking() as client, tempfile.TemporaryDirectory() as temporary:
            if first:
                self._create(candidate)
            flavor = Path(temporary) / "model"
            write_flavor(flavor, model_id=model_id, task=candidate.task, about=about, quantized=candidate.quantized)
            client.log_model_artifacts(model_id, str(flavor))
            objective = "" if candidate.objective is None else repr(candidate.objective)
            tags = {"trial_key": candidate.trial, "objective": objective, "protocol": candidate.protocol}
            text = f"{run.name}, `hificl predict --adapter runs/{candidate.trial}/adapter`"
            name, source = candidate.name, f"models:/{model_id}"
            with _process_wide(self.tracker.uri):
                return client.create_model_version(
                    name, source, run.run_id, model_id=model_id, tags=tags, description=text
                )

    def _create(self, candidate: ModelCandidate) -> None:
        trained = f"{candidate.method} on {candidate.backbone} for {candidate.task}"
        text = f"{trained}; `{BEST}` has the highest score on the selection split."
        try:
            self.tracker.mlflow.create_registered_model(candidate.name, description=text)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _point_at_best(self, name: str, protocol: str, versions: Iterable[ModelVersion]) -> None:
        comparable = [version for version in versions if version.tags.get("protocol") == protocol]
        scored = [version for version in comparable if version.tags.get("objective")]
        if not scored:
            return
        best = max(scored, key=lambda version: (float(version.tags["objective"]), -int(version.version)))
        with self.tracker.talking() as client:
            if client.get_registered_model(name).aliases.get(BEST) != str(best.version):
                client.set_registered_model_alias(name, BEST, str(best.version))


def log_adapter(tracker: Tracker, run_id: str, folder: Path) -> None:
    """Keep a trained adapter as the run's logged model; the same files are not kept twice.

    Raises:
        WorkError: the folder is missing or empty.
    """
    digest = folder_digest(folder)
    if digest is None:
        raise WorkError("no adapter files", where=str(folder))
    with tracker.talking() as client:
        run = LoggedRun.of(client.get_run(run_id))
        if run.tags.get("adapter_digest") == digest:
            return
        tags = {"trial_key": run.trial_key, "adapter_digest": digest}
        begun = client.search_logged_models([run.experiment_id], filter_string=f"source_run_id = '{run_id}'")
        same = [model for model in begun if model.tags.get("adapter_digest") == digest]  # by a call cut off
        model = same[0] if same else client.create_logged_model(
            run.experiment_id, name=_model_name(run.name.partition(" ")[0] or "adapter"), source_run_id=run_id,
            model_type="adapter", tags=tags,
        )  # fmt: skip
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    tracker.tag(run_id, {"adapter_digest": digest, "adapter_model_id": model.model_id})


def write_flavor(out: Path, *, model_id: str, task: str, about: dict[str, str], quantized: bool = False) -> None:
    """Write what has to lie beside an adapter's own files for `mlflow.pyfunc.load_model`.

    The code that answers is inside, as the library `hificl`, and `requirements.txt` pins what it imports: a fresh
    environment of these, with none of this project's, gives the same answers.

    Args:
        out: a folder that does not exist yet.
        model_id: of the logged model that holds the adapter's files at its top.
        task: whose prompt is used; it decides whether there is a question.
        about: kept as the model's metadata, beside the commit of the code; names its backbone and method.
        quantized: whether the backbone's weights are in few bits.
    """
    asks = tasks.get(task).template.asks
    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "image")]
    if asks:
        columns.append(ColSpec(DataType.string, "question"))
    model = Model(model_id=model_id)
    with tempfile.TemporaryDirectory() as temporary:
        served = Path(temporary) / CODE.name
        served.write_text(as_library(CODE.read_text(encoding="utf-8")), encoding="utf-8")
        for name, content in _library().items():
            place = Path(temporary) / LIBRARY / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        mlflow.pyfunc.save_model(
            out, python_model=str(served), code_paths=[str(Path(temporary) / LIBRARY)], input_example=_example(asks),
            signature=ModelSignature(inputs=Schema(columns), outputs=Schema([ColSpec(DataType.string)])),
            # given, so that MLflow does not load the model to find out
            pip_requirements=_requirements(task, about, quantized), model_config={"project": ""},
            metadata={**about, "commit": _commit()}, mlflow_model=model,
        )  # fmt: skip
    # the adapter's files are in the logged model since its trial ended: named here, not kept twice
    model.flavors["python_function"]["artifacts"] = {"adapter": {"path": ".", "uri": "."}}
    model.flavors["python_function"]["model_code_path"] = CODE.name  # where it lay on this machine is nobody's business
    model.save(out / "MLmodel")


@functools.cache
def _library() -> dict[str, bytes]:
    """Return the files of the library that a model answers with, by their paths in it."""
    files = [HOME / "__init__.py", HOME / "methods.py"]
    files += [path for room in _ROOMS for path in sorted((HOME / room).rglob("*")) if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    return {
        path.relative_to(HOME).as_posix(): (
            as_library(path.read_text(encoding="utf-8")).encode() if path.suffix == ".py" else path.read_bytes()
        )
        for path in files
    }


@functools.cache
def _commit() -> str:
    return head_commit(HOME.parent) or "unknown"


def _requirements(task: str, about: Mapping[str, str], quantized: bool) -> list[str]:
    """Return what a fresh environment installs, with the package that offers its method, task or backbone."""
    offered = extensions({*task.split("+"), about.get("backbone", ""), *about.get("method", "").split("+")})
    names = [*_NEEDED, *([_QUANTIZED] if quantized else []), *sorted(offered)]
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


@functools.cache
def _example(asks: bool) -> pd.DataFrame:
    buffer = io.BytesIO()
    Image.new("RGB", (_EXAMPLE_SIDE, _EXAMPLE_SIDE), (200, 40, 40)).save(buffer, format="PNG")
    row = {"image": base64.b64encode(buffer.getvalue()).decode()}
    return pd.DataFrame([{**row, **({"question": "What color is this?"} if asks else {})}])


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


def _model_name(name: str) -> str:
    return "".join("-" if char in "/:.%\"'" else char for char in name)
