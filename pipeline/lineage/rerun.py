"""One trial again, in a private folder: its commit's code, its own parameters, runs, evaluations and MLflow store.

Code that has `hificl run-trial` is given the trial's own JSON; older code a study whose one row has every setting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import backbones
from pipeline.config.load import Params, merge
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core import plain_yaml
from pipeline.core.errors import InputError, WorkError
from pipeline.core.files import folder_digest
from pipeline.core.plain_yaml import Json
from pipeline.data.manifest import Manifest
from pipeline.lineage.run_record import RunRecord, exact
from pipeline.records.evaluation import Evaluation, Evaluations
from pipeline.records.trial import Provenance
from pipeline.tasks import of_manifest, tasks
from pipeline.tracking import store
from pipeline.tracking.client import Tracker
from pipeline.tracking.provenance import git_command, has_commit

_RECORDED = Path("pipeline/sweep/recorded.py")  # code that has it takes a trial's own JSON (`hificl run-trial`)
_STANDARD_ERROR = 2
STUDY = "again"
_STAGES = ("stages.train", "stages.evaluate")
_IDENTITY = ("backbone", "backbone_digest", "task", "manifest_digest", "method", "options", "seed")
_GENERATION = ("num_beams", "length_penalty", "max_new_tokens")
_CUT = "(cut off:"  # how a diff that was too long ends


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


def rerun(
    record: RunRecord, params: Params, manifest: Manifest, code: Path, folder: Path, parents: Sequence[Json] = ()
) -> Again:
    """Train and evaluate a recorded trial in `folder`, with the code in `code`.

    Args:
        record: the trial's.
        params: where weights lie.
        manifest: its samples.
        code: the project's folder at its commit.
        folder: where all of it is done.
        parents: the configurations of the trials that it goes on from, the first one first.

    Raises:
        WorkError: it failed; its last line is in the message.
    """
    folder.mkdir(parents=True)
    (folder / "pipeline").symlink_to(code / "pipeline")
    (folder / "stages").symlink_to(code / "stages")
    here = replace(manifest, image_root=manifest.image_root.resolve())
    here.save(folder / "data/manifests" / manifest.task / "manifest.json")
    raw, scored = surroundings(record, params), record.evaluation is not None
    parts = of_manifest(manifest).of_name
    described: Json = {name: part.definition for name, part in parts.items() if part.definition is not None}
    if described:
        raw["tasks"] = described  # files of the user's own: nothing but this describes the tasks
    whole = (code / _RECORDED).is_file()
    written = plain_yaml.write(raw if whole else study_params(record, raw))
    (folder / "params.yaml").write_text(written, encoding="utf-8")
    if whole:
        for number, config in enumerate(parents):
            (folder / f"parent{number}.json").write_text(json.dumps(config), encoding="utf-8")
            _run(folder, code, "pipeline", "run-trial", f"parent{number}.json", "--train-only")
        (folder / "trial.json").write_text(json.dumps(record.config), encoding="utf-8")
        how = ["--train-only"]
        if record.stopped_after is not None:
            how += ["--stop-after", str(record.stopped_after)]
        if record.evaluation is not None:
            (folder / "evaluation.json").write_text(json.dumps(record.evaluation.evaluation), encoding="utf-8")
            how = ["--evaluation", "evaluation.json"]
        _run(folder, code, "pipeline", "run-trial", "trial.json", *how)
    else:
        for stage in _STAGES if scored else _STAGES[:1]:
            _run(folder, code, stage)
    return _result(folder, record.key if parents else None, scored=scored)


def surroundings(record: RunRecord, params: Params) -> Json:
    """Return a params.yaml with all that is no part of a trial: where weights and files lie, and the machine."""
    backbone = record.backbone
    profile: Json = {
        "backbones": [backbone], "tasks": [record.task], "studies": [STUDY],
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


def _result(folder: Path, key: str | None, *, scored: bool) -> Again:
    (done,) = (folder / "runs").glob(f"{key or '*'}/done.json")
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


def study_params(record: RunRecord, machine: Json) -> Json:
    """Return a params.yaml: what is no part of the trial, with the study and how it is scored."""
    config = record.config
    study: Json = {
        "title": f"Run {record.run_id} again", "seeds": [config["seed"]],
        "backbones": [backbones.get(record.backbone).stands_for or record.backbone],
        "tasks": [tasks.get(record.task).stands_for],
        "methods": {"again": {"method": config["method"], "set": {**_settings(config), **record.options}}},
    }  # fmt: skip
    return merge(machine, {"studies": {STUDY: study}, "evaluate": _evaluate(record.evaluation)})


def _settings(config: Json) -> Json:
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


def _evaluate(evaluation: Evaluation | None) -> Json:
    """Return how the trial was scored, by the names of params.yaml."""
    if evaluation is None:
        return {}
    plain = _defaults(EvaluationConfig, EvaluationConfig.model_fields)
    given = {name: value for name, value in evaluation.evaluation.items() if (name, value) not in plain}
    for name in ("trial", "split"):
        given.pop(name, None)
    generation = {name: given.pop(name) for name in _GENERATION if name in given}
    return {"num_evaluation_samples": given.pop("num_samples", None), **given, "generation": generation}


def check_code(repository: Path, provenance: Provenance, run_id: str) -> None:
    """Check that a run's code can be had again.

    Raises:
        InputError: no commit recorded, one that this repository does not know, or changes that were not kept.
    """
    commit = provenance.commit
    here = "Give --here to run the code as it is now"
    if not commit:
        note = provenance.note or "nothing was recorded"
        raise InputError(f"the run's code version is unknown: {note}", where=run_id, way_out=here)
    if not has_commit(repository, commit):
        raise InputError(
            f"commit {commit} is not in this repository", where=str(repository), way_out=f"Fetch it. {here}"
        )
    diff = provenance.diff
    only_big = not diff and set(provenance.changed) <= set(provenance.left_out)
    if provenance.dirty and ((not diff and not only_big) or _CUT in diff[-200:]):
        changed = ", ".join(provenance.changed[:5])
        raise InputError(
            f"the run was made from a dirty tree whose changes were not kept whole ({changed})",
            where=run_id, way_out=here,
        )  # fmt: skip


@contextmanager
def checked_out(repository: Path, provenance: Provenance, folder: Path) -> Iterator[Path]:
    """Give a folder with a run's code, which is removed at the end.

    Args:
        repository: the checkout.
        provenance: the run's; `check_code` has accepted it.
        folder: where the worktree goes; it must not exist.

    Raises:
        WorkError: git failed.
    """
    _git(repository, "worktree", "add", "--detach", "--quiet", str(folder), str(provenance.commit))
    try:
        if provenance.diff:
            _git(folder, "apply", "--whitespace=nowarn", "-", text=provenance.diff)
        prefix = _git(repository, "rev-parse", "--show-prefix").strip()
        yield folder / prefix
    finally:
        _git(repository, "worktree", "remove", "--force", str(folder))


def _git(folder: Path, *arguments: str, text: str | None = None) -> str:
    # no hooks: a checkout here is nobody's business
    command = [*git_command(folder), "-c", "core.hooksPath=/dev/null", *arguments]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WorkError(f"git {arguments[0]} failed: {last}", where=str(folder))
    return done.stdout
