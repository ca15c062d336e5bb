"""One recorded trial by itself: trained and scored from its own JSON, without any setting of a study or a profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline import backbones
from pipeline.config.load import Explicit, Params, Study, StudyMethod
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core.errors import validate
from pipeline.records import part_of
from pipeline.records.evaluation import Evaluation, Evaluations
from pipeline.sweep.evaluate import evaluate
from pipeline.sweep.train import sweep
from pipeline.tasks import tasks

STUDY = "again"  # what the trial's one row stands in


@dataclass(frozen=True)
class Recorded:
    """A trial, and how it is scored; None: as params.yaml has it."""

    config: TrialConfig
    evaluation: EvaluationConfig | None = None


def read_recorded(trial: Path, evaluation: Path | None = None) -> Recorded:
    """Read `runs/KEY/config.json` and `evaluations/KEY.json`, or files of the configurations alone.

    Raises:
        InputError: no such file, no JSON, or a field that this code does not know.
    """
    config = validate(TrialConfig, part_of(trial, "config"), str(trial), noun="field")
    if evaluation is None:
        return Recorded(config)
    return Recorded(
        config, validate(EvaluationConfig, part_of(evaluation, "evaluation"), str(evaluation), noun="field")
    )


def params_of(recorded: Recorded, params: Params) -> Params:
    """Return parameters whose one study is the trial; weights, sweep and tracking are those of `params`."""
    config = recorded.config
    row = StudyMethod(method=config.method, trial=config, evaluation=recorded.evaluation)
    backbone, task = backbones.get(config.backbone).stands_for or config.backbone, tasks.get(config.task).stands_for
    title, rows, seeds = f"Trial {config.key}", {config.method: row}, [config.seed]
    study = Study(title=title, methods=rows, seeds=seeds, backbones=[backbone], tasks=[task])
    run = {"backbones": [config.backbone], "tasks": [config.task], "studies": [STUDY], "stand_ins": {}}
    return params.model_copy(
        update={"run": params.run.model_copy(update=run), "explicit": Explicit(), "studies": {STUDY: study}}
    )


def train_recorded(recorded: Recorded, params: Params, root: Path | None = None) -> None:
    """Train the trial, unless the store has it.

    Raises:
        InputError: weights, samples or cluster are not in order, or not those of the record.
        WorkError: it failed.
    """
    sweep(params_of(recorded, params), [STUDY], root)


def score_recorded(recorded: Recorded, params: Params, root: Path | None = None) -> tuple[str, Evaluation]:
    """Score the trial, unless that is done, and return the score's key and the score.

    Raises:
        InputError: as `train_recorded`.
        WorkError: it is not trained, or could not be scored.
    """
    root = root or Path.cwd()
    evaluate(params_of(recorded, params), [STUDY], root)
    evaluations = Evaluations(root / "evaluations")
    (cell,) = evaluations.study(STUDY).cells
    key = cell.evaluation or ""
    return key, evaluations.read(key)
