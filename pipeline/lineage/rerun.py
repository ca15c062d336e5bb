"""One trial again, in a private folder: its own parameters, runs, evaluations and MLflow store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.load import Params
from pipeline.core import plain_yaml
from pipeline.core.errors import WorkError
from pipeline.core.files import folder_digest
from pipeline.core.plain_yaml import Json
from pipeline.data.manifest import Manifest
from pipeline.lineage import older
from pipeline.lineage.record import RunRecord, exact
from pipeline.records.evaluation import Evaluation
from pipeline.records.evaluations import Evaluations
from pipeline.tracking import store
from pipeline.tracking.client import Tracker

_ENTRY = Path("pipeline/commands/run_trial.py")  # code that has it takes a trial's own JSON
_STANDARD_ERROR = 2


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
        WorkError: it failed; its last line is in the message.
    """
    folder.mkdir(parents=True)
    (folder / "pipeline").symlink_to(code / "pipeline")
    (folder / "stages").symlink_to(code / "stages")
    here = replace(manifest, image_root=manifest.image_root.resolve())
    here.save(folder / "data/manifests" / manifest.task / "manifest.json")
    raw, scored = surroundings(record, params), record.evaluation is not None
    whole = (code / _ENTRY).is_file()
    written = plain_yaml.write(raw if whole else older.study_params(record, raw))
    (folder / "params.yaml").write_text(written, encoding="utf-8")
    if whole:
        (folder / "trial.json").write_text(json.dumps(record.config), encoding="utf-8")
        how = ["--train-only"]
        if record.evaluation is not None:
            (folder / "evaluation.json").write_text(json.dumps(record.evaluation.evaluation), encoding="utf-8")
            how = ["--evaluation", "evaluation.json"]
        _run(folder, code, "pipeline", "run-trial", "trial.json", *how)
    else:
        for stage in older.STAGES if scored else older.STAGES[:1]:
            _run(folder, code, stage)
    return _result(folder, scored=scored)


def surroundings(record: RunRecord, params: Params) -> Json:
    """Return a params.yaml with all that is no part of a trial: where weights and files lie, and the machine."""
    backbone = record.backbone
    profile: Json = {
        "backbones": [backbone], "tasks": [record.task], "studies": [older.STUDY],
        "data_root": str(Path(params.run.data_root).resolve()),
    }  # fmt: skip
    source = params.backbone_source(backbone).model_dump()
    if source["weights"]:
        source["weights"] = str(Path(source["weights"]).resolve())
    # only what older code knows too; a pack of one and one slot: nothing else runs beside it
    sweep: Json = {
        "slots": 1, "threads_per_worker": int(record.tags.get("threads_per_worker", params.sweep.threads_per_worker)),
        "cpus_per_worker": params.sweep.cpus_per_worker, "gpus_per_worker": params.sweep.gpus_per_worker,
    }  # fmt: skip
    return {
        "profiles": {"again": profile}, "run": profile, "backbones": {backbone: source}, "sweep": sweep,
        "evaluate": {"generation": {"batch_size": params.evaluate.generation.batch_size}},
        "tracking": {"uri": None, "system_metrics": False}, "studies": {},
    }  # fmt: skip


def _run(folder: Path, code: Path, module: str, *arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "HIFICL_DATA_ROOT")}
    command = [sys.executable, "-m", module, *arguments]
    # standard output is this command's JSON, so its own goes to standard error with its progress
    environment["PYTHONPATH"] = str(code)
    done = subprocess.run(command, cwd=folder, env=environment, stdout=_STANDARD_ERROR, check=False)
    if done.returncode:
        words = " ".join([module, *arguments[:1]])
        raise WorkError(f"{words} ended with status {done.returncode}; its own message stands above", where=str(folder))


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
        key, exact(tracker, run_id, run.metrics, evaluation), evaluation, folder_digest(done.parent / "adapter"),
        run.tags.get("mlflow.source.git.commit"),
    )  # fmt: skip
