"""One trial again, in a private folder: its own parameters, runs, evaluations and MLflow store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import plain_yaml
from pipeline.config import Params
from pipeline.data.manifest import Manifest
from pipeline.digests import folder_digest
from pipeline.errors import WorkError
from pipeline.lineage.record import RunRecord, exact
from pipeline.records.evaluation import Evaluation
from pipeline.records.evaluations import Evaluations
from pipeline.tracking import store
from pipeline.tracking.runs import Tracker
from pipeline.trial import EvaluationConfig, TrialConfig

STUDY = "again"
_IDENTITY = ("backbone", "backbone_digest", "task", "manifest_digest", "method", "options", "seed")
_GENERATION = ("num_beams", "length_penalty", "max_new_tokens")
_STANDARD_ERROR = 2
_STAGES = ("stages.train", "stages.evaluate")


@dataclass(frozen=True)
class Again:
    """What the second time gave.

    Attributes:
        key: the trial's key.
        metrics: last values by name, with all their digits.
        evaluation: the score, or None where the first time was not scored.
        adapter_digest: of the adapter; None for a method without training.
        commit: the code version that ran.
    """

    key: str
    metrics: dict[str, float]
    evaluation: Evaluation | None
    adapter_digest: str | None
    commit: str | None


def rerun(record: RunRecord, params: Params, manifest: Manifest, code: Path, folder: Path) -> Again:
    """Train and evaluate a recorded trial in `folder`, with the code in `code`.

    Raises:
        WorkError: a stage failed; its last line is in the message.
    """
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(plain_yaml.write(_params(record, params)), encoding="utf-8")
    (folder / "pipeline").symlink_to(code / "pipeline")
    (folder / "stages").symlink_to(code / "stages")
    here = replace(manifest, image_root=manifest.image_root.resolve())
    here.save(folder / "data/manifests" / manifest.task / "manifest.json")
    for stage in _STAGES if record.evaluation else _STAGES[:1]:
        _run(stage, folder, code)
    return _result(folder, scored=record.evaluation is not None)


def _params(record: RunRecord, params: Params) -> dict[str, Any]:
    """Return a params.yaml whose one study is this one trial, every setting written out."""
    config = record.config
    row = _settings(config)
    profile = {
        "backbones": [config["backbone"]], "tasks": [config["task"]], "studies": [STUDY],
        "data_root": str(Path(params.run.data_root).resolve()),
    }  # fmt: skip
    source = params.backbone_source(config["backbone"]).model_dump()
    if source["weights"]:
        source["weights"] = str(Path(source["weights"]).resolve())
    # only what older code knows too; a pack of one and one slot: nothing else runs beside it
    sweep = {
        "slots": 1, "threads_per_worker": int(record.tags.get("threads_per_worker", params.sweep.threads_per_worker)),
        "cpus_per_worker": params.sweep.cpus_per_worker, "gpus_per_worker": params.sweep.gpus_per_worker,
    }  # fmt: skip
    return {
        "profiles": {"again": profile}, "run": profile, "backbones": {config["backbone"]: source}, "sweep": sweep,
        "evaluate": _evaluate(record.evaluation, params), "tracking": {"uri": None, "system_metrics": False},
        "studies": {
            STUDY: {
                "title": f"Run {record.run_id} again", "backbones": _paper_backbones(config["backbone"]),
                "tasks": _paper_tasks(config["task"]), "seeds": [config["seed"]],
                "methods": {"again": {"method": config["method"], "set": {**row, **config["options"]}}},
            }
        },
    }  # fmt: skip


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return every training setting of a configuration, by its name in params.yaml."""
    later = _defaults(TrialConfig, TrialConfig.later)
    row = {name: value for name, value in config.items() if name not in _IDENTITY and (name, value) not in later}
    if not config["epochs"]:  # nothing is trained: what is neutral is no setting
        return {name: value for name, value in row.items() if value not in (0, "none") or isinstance(value, bool)}
    row["epochs_below_1000"] = row["epochs"]
    return {name: value for name, value in row.items() if (name, value) != ("num_shots", 0)}  # 0: no teacher


def _defaults(kind: type[TrialConfig] | type[EvaluationConfig], names: Iterable[str]) -> list[tuple[str, Any]]:
    """Return the fields at their defaults: older code does not know them all, and they change nothing."""
    return [(name, kind.model_fields[name].default) for name in names]


def _paper_backbones(backbone: str) -> list[str]:
    from pipeline import backbones

    return [backbones.get(backbone).stands_for or backbone]


def _paper_tasks(task: str) -> list[str]:
    from pipeline.tasks import tasks

    return [tasks.get(task).stands_for]


def _evaluate(evaluation: Evaluation | None, params: Params) -> dict[str, Any]:
    batch_size = params.evaluate.generation.batch_size
    if evaluation is None:
        return {"generation": {"batch_size": batch_size}}
    plain = _defaults(EvaluationConfig, EvaluationConfig.model_fields)
    given = {name: value for name, value in evaluation.evaluation.items() if (name, value) not in plain}
    for name in ("trial", "split"):
        given.pop(name, None)
    generation = {name: given.pop(name) for name in _GENERATION if name in given}
    return {
        "num_evaluation_samples": given.pop("num_samples", None), **given,
        "generation": {**generation, "batch_size": batch_size},
    }  # fmt: skip


def _run(stage: str, folder: Path, code: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "HIFICL_DATA_ROOT")}
    command = [sys.executable, "-m", stage]
    # standard output is this command's JSON, so a stage's goes to standard error with its progress
    own = {**environment, "PYTHONPATH": str(code)}
    done = subprocess.run(command, cwd=folder, env=own, stdout=_STANDARD_ERROR, check=False)
    if done.returncode:
        raise WorkError(f"{stage} ended with status {done.returncode}; its own message stands above", where=str(folder))


def _result(folder: Path, *, scored: bool) -> Again:
    (done,) = (folder / "runs").glob("*/done.json")
    key = done.parent.name
    tracker = Tracker(store.sqlite_uri(folder / "mlflow.db"), folder)
    run_id = tracker.find_run(key)
    if run_id is None:
        raise WorkError(f"trial {key} has no run", where=str(folder))
    run = tracker.read_run(run_id)
    evaluation = None
    if scored:
        (path,) = (folder / "evaluations").glob("*.json")
        evaluation = Evaluations(folder / "evaluations").read(path.stem)
    return Again(
        key, exact(tracker, run_id, run["metrics"], evaluation), evaluation, folder_digest(done.parent / "adapter"),
        run["tags"].get("mlflow.source.git.commit"),
    )  # fmt: skip
