"""`hificl plan`: what a study takes on the real backbones, before anything is downloaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.config import Params, load
from pipeline.cost.hours import Rates, forecast
from pipeline.cost.steps import Prompt
from pipeline.errors import InputError
from pipeline.sweep.space import Digests, cells, points
from pipeline.tasks import tasks
from pipeline.trial import TrialConfig

REAL = "real"
WHOLE_SPLIT = 10_000  # stands for a split that is evaluated whole, whose size only its files tell
_AS_GIVEN = "not read: a forecast needs no weights and no data"


def plan(
    study: str, *, gpus: int, rates: Rates, profile: str = REAL, overrides: list[str] | None = None
) -> dict[str, Any]:
    """Return the GPU-hours of a study on the real backbones.

    Args:
        study: its name.
        gpus: over which trials are spread.
        rates: of a GPU.
        profile: whose settings count.
        overrides: as `--set` takes them.

    Raises:
        InputError: unknown study or profile, or fewer than one GPU.
    """
    if gpus < 1:
        raise InputError(f"at least one GPU is needed, got {gpus}", where="--gpus")
    if not 0 < rates.utilisation <= 1:
        raise InputError(f"a share between 0 and 1 is needed, got {rates.utilisation}", where="--utilisation")
    params = load(overrides=overrides or [], profile=profile)
    found = trials(params, study)
    evaluated = {task: evaluated_samples(params, task) for task in params.run.tasks}
    images = {task: _drawn(params, task) + count for task, count in evaluated.items()}
    prompt = Prompt()
    result = forecast(found, evaluated=evaluated, images=images, rates=rates, prompt=prompt)
    total = result.total
    return {
        "study": study, "profile": profile, "gpus": gpus, "gpu_hours": total, "wall_hours": total / gpus,
        "gpu_hours_with_shared_teacher": total - result.teacher_saved, "trials": result.trials,
        "gpu_hours_by_part": result.hours, "gpu_hours_by_method": result.by_method,
        "not_counted": result.not_counted,
        "assumed": {
            **asdict(rates), **asdict(prompt), "evaluation_samples": evaluated, "images_a_task": images,
            "picture": "480 x 640 pixels where a backbone keeps a picture's size",
        },
        "method": "FLOPs counted by the formulas of pipeline/cost from the real configurations; "
        "hours = FLOPs / (peak x utilisation), decoding = weights read / (bandwidth x utilisation). No GPU was asked.",
    }  # fmt: skip


def evaluated_samples(params: Params, task: str) -> int:
    """Return how many samples of a task are scored, as far as params.yaml and the official split's size tell."""
    whole = tasks.get(task).official_evaluation or WHOLE_SPLIT
    drawn = params.subsample.of(task).num_evaluation
    return min(params.evaluate.num_evaluation_samples or whole, whole if drawn == "whole" else drawn)


def _drawn(params: Params, task: str) -> int:
    sizes = params.subsample.of(task)
    return sizes.num_train + sizes.num_selection


def as_given(params: Params) -> Digests:
    """Return what stands for digests where nothing is read: the sizes that params.yaml asks for."""
    return Digests(
        backbones=dict.fromkeys(params.run.backbones, _AS_GIVEN),
        manifests=dict.fromkeys(params.run.tasks, _AS_GIVEN),
        train_sizes={task: params.subsample.of(task).num_train for task in params.run.tasks},
    )


def trials(params: Params, study: str) -> list[TrialConfig]:
    """Return the trials of a study, each once, with nothing read from disk."""
    digests = as_given(params)
    found = (cell.trial(point) for cell in cells(params, study, digests) for point in points(cell, params))
    return list({trial.key: trial for trial in found}.values())
