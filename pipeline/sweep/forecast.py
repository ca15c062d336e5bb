"""What params.yaml alone tells of a study's trials: their number and sizes, with nothing read from disk."""

from __future__ import annotations

from pipeline.config import Params
from pipeline.sweep.space import Digests, cells, points
from pipeline.tasks import tasks
from pipeline.trial import TrialConfig

WHOLE_SPLIT = 10_000  # stands for a split that is evaluated whole, whose size only its files tell
_AS_GIVEN = "not read: a forecast needs no weights and no data"


def evaluated_samples(params: Params, task: str) -> int:
    """Return how many samples of a task are scored, as far as params.yaml and the official split's size tell."""
    whole = tasks.get(task).official_evaluation or WHOLE_SPLIT
    drawn = params.subsample.of(task).num_evaluation
    return min(params.evaluate.num_evaluation_samples or whole, whole if drawn == "whole" else drawn)


def drawn_samples(params: Params, task: str) -> int:
    """Return how many samples are drawn to train and to choose by."""
    sizes = params.subsample.of(task)
    return sizes.num_train + sizes.num_selection


def as_given(params: Params) -> Digests:
    """Return what stands for digests where nothing is read: the sizes that params.yaml asks for."""
    return Digests(
        backbones=dict.fromkeys(params.run.backbones, _AS_GIVEN),
        manifests=dict.fromkeys(params.run.tasks, _AS_GIVEN),
        train_sizes={task: params.subsample.of(task).num_train for task in params.run.tasks},
        selection_sizes={task: params.subsample.of(task).num_selection for task in params.run.tasks},
    )


def trials(params: Params, study: str) -> list[TrialConfig]:
    """Return the trials of a study, each once, with nothing read from disk."""
    digests = as_given(params)
    planned = (cell.trial(point) for cell in cells(params, study, digests) for point in points(cell, params))
    return list({trial.key: trial for trial in planned}.values())
