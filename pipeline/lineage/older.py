"""What code of before `hificl run-trial` is given: a study whose one row has every setting of a recorded trial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline import backbones
from pipeline.config.load import merge
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core.plain_yaml import Json
from pipeline.lineage.record import RunRecord
from pipeline.records.evaluation import Evaluation
from pipeline.tasks import tasks

STUDY = "again"
STAGES = ("stages.train", "stages.evaluate")
_IDENTITY = ("backbone", "backbone_digest", "task", "manifest_digest", "method", "options", "seed")
_GENERATION = ("num_beams", "length_penalty", "max_new_tokens")


def study_params(record: RunRecord, surroundings: Json) -> Json:
    """Return a params.yaml: what is no part of the trial, with the study and how it is scored."""
    config = record.config
    study: Json = {
        "title": f"Run {record.run_id} again", "seeds": [config["seed"]],
        "backbones": [backbones.get(record.backbone).stands_for or record.backbone],
        "tasks": [tasks.get(record.task).stands_for],
        "methods": {"again": {"method": config["method"], "set": {**_settings(config), **record.options}}},
    }  # fmt: skip
    return merge(surroundings, {"studies": {STUDY: study}, "evaluate": _evaluate(record.evaluation)})


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
