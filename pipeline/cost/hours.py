"""GPU-hours of trials and their evaluation from counted FLOPs and stated rates.

What computes (training, teacher, vision, prompts) takes FLOPs / (peak x utilisation). What is decoded token by token
reads all of the decoder's weights for every token of a batch, so it takes weights x 2 bytes x steps / (bandwidth x
utilisation). An image's visual tokens are computed once for all trials of a backbone and a task whose vision tower
stays frozen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from pipeline import backbones, methods
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.cost.flops import Costs, Prompt

BYTES_A_WEIGHT = 2  # bf16
PARTS = ("vision", "training", "teacher", "selection", "evaluation")


@dataclass(frozen=True)
class Rates:
    """What a GPU does; the defaults are an H100's dense bf16 peak and memory, and an assumed share of both.

    Attributes:
        peak_tflops: dense, in the precision of training.
        bandwidth_tb: terabytes a second that memory delivers.
        utilisation: share of either that the work reaches; measure it with `hificl bench step --device cuda`.
        batch_size: prompts that are decoded together.
        new_tokens: of an answer.
    """

    peak_tflops: float = 989.0
    bandwidth_tb: float = 3.35
    utilisation: float = 0.4
    batch_size: int = 16
    new_tokens: int = 10

    def hours(self, flops: float) -> float:
        """Return the hours of computing work."""
        return flops / (self.peak_tflops * 1e12 * self.utilisation) / 3600

    def decoding_hours(self, weights: float, samples: int) -> float:
        """Return the hours of decoding answers behind `samples` prompts."""
        steps = ceil(samples / self.batch_size) * self.new_tokens
        return weights * BYTES_A_WEIGHT * steps / (self.bandwidth_tb * 1e12 * self.utilisation) / 3600


@dataclass
class Forecast:
    """What trials are expected to take.

    Attributes:
        hours: GPU-hours by part of the work.
        by_method: GPU-hours by backbone and method.
        teacher_saved: of the teacher's hours, those that are saved where trials that see the same batches and
            demonstrations share one teacher.
        trials: how many.
        not_counted: backbones without a formula, and why.
    """

    hours: dict[str, float]
    by_method: dict[str, dict[str, float]]
    teacher_saved: float
    trials: int
    not_counted: dict[str, str]

    @property
    def total(self) -> float:
        """GPU-hours of everything, each trial with its own teacher."""
        return sum(self.hours.values())

    def as_dict(self) -> dict[str, object]:
        """Return plain values."""
        return {**asdict(self), "total": self.total}


def forecast(
    trials: Iterable[TrialConfig],
    *,
    evaluated: Mapping[str, int],
    images: Mapping[str, int],
    rates: Rates,
    prompt: Prompt | None = None,
) -> Forecast:
    """Return what trials on real backbones are expected to take.

    Args:
        trials: trained or not.
        evaluated: samples that each trial is scored on, by task.
        images: that any trial of a task sees, by task: training, selection and evaluation.
        rates: of the GPU.
        prompt: lengths.

    Raises:
        InputError: an unknown backbone or method.
    """
    hours = dict.fromkeys(PARTS, 0.0)
    by_method: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    not_counted: dict[str, str] = {}
    made: dict[str, Costs] = {}
    seen: set[tuple[str, str]] = set()
    teachers: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    number = 0
    for trial in trials:
        number += 1
        if trial.backbone not in made and trial.backbone not in not_counted:
            try:
                loaded = backbones.load(trial.backbone, variant="meta")
                made[trial.backbone] = Costs(loaded.backbone, loaded.model, prompt)
            except InputError as error:
                not_counted[trial.backbone] = str(error)
        if trial.backbone in not_counted:
            continue
        costs = made[trial.backbone]
        if (trial.backbone, trial.task) not in seen:
            seen.add((trial.backbone, trial.task))
            hours["vision"] += rates.hours(costs.image.forward * images[trial.task])
        spent = _spent(trial, costs, evaluated[trial.task], rates)
        if spent["teacher"]:
            teachers[_shared(trial)].append(spent["teacher"])
        for part, value in spent.items():
            hours[part] += value
            by_method[trial.backbone][trial.method] += value
    saved = sum(sum(values) - max(values) for values in teachers.values())
    return Forecast(hours, {name: dict(row) for name, row in by_method.items()}, saved, number, not_counted)


def _shared(trial: TrialConfig) -> tuple[Any, ...]:
    """Trials that are equal in this see the same batches with the same demonstrations."""
    return (
        trial.backbone, trial.task, *trial.pool, trial.num_shots, trial.epochs,
        trial.micro_batch_size * trial.accumulation * trial.world_size, trial.precision,
    )  # fmt: skip


def _spent(trial: TrialConfig, costs: Costs, evaluated: int, rates: Rates) -> dict[str, float]:
    """Return one trial's GPU-hours by part, its images' own pass left out where it is shared."""
    facts = methods.facts(trial)
    decoder = costs.decoder
    own_vision = costs.image.forward if facts.trains_vision else 0.0
    spent = dict.fromkeys(PARTS, 0.0)
    if trial.trained:
        step = costs.step(trial.method, trial.options, shots=trial.num_shots)
        steps = trial.epochs * trial.num_train_samples
        before = costs.prefill(trial.num_shots - 1) if facts.starts else 0.0
        spent["training"] = rates.hours(steps * (step.reused - step.teacher) + before)
        spent["teacher"] = rates.hours(steps * step.teacher)
        looked_at = trial.epochs * trial.num_selection_samples
        spent["selection"] = rates.hours(looked_at * (costs.prefill() + own_vision))
        spent["selection"] += rates.decoding_hours(decoder.total, looked_at)
    shots = 0 if trial.trained else int(trial.options.get("num_shots", 0))
    spent["evaluation"] = rates.hours(evaluated * (costs.prefill(shots) + own_vision))
    spent["evaluation"] += rates.decoding_hours(decoder.total, evaluated)
    return spent
