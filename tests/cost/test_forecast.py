"""The forecast of a study: what it adds up, how it scales, and what it refuses."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.plan import study_hours as plan
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.cost.hours import Rates, forecast

PROJECT = Path(__file__).resolve().parents[2]
IDEFICS2 = "idefics2-8b-base"


def trial(method: str, **fields: Any) -> TrialConfig:
    shared = {
        "backbone": IDEFICS2, "backbone_digest": "", "task": "vqav2", "manifest_digest": "", "num_train_samples": 100,
        "epochs": 2, "num_selection_samples": 10, "micro_batch_size": 2, "accumulation": 2,
    }  # fmt: skip
    return TrialConfig(method=method, **{**shared, **fields})


def expected(*trials: TrialConfig, rates: Rates | None = None) -> Any:
    return forecast(trials, evaluated=defaultdict(lambda: 100), images=defaultdict(lambda: 210), rates=rates or Rates())


def test_trials_that_see_the_same_demonstrations_share_a_teacher() -> None:
    one = expected(trial("mimic", num_shots=8))
    three = expected(*(trial("mimic", num_shots=8, learning_rate=rate) for rate in (0.1, 0.2, 0.3)))
    other = expected(*(trial("mimic", num_shots=8, seed=seed) for seed in (0, 1, 2)))
    assert one.teacher_saved == 0
    assert three.hours["teacher"] == pytest.approx(3 * one.hours["teacher"])
    assert three.teacher_saved == pytest.approx(2 * one.hours["teacher"])
    assert other.teacher_saved == 0


def test_images_are_computed_once_for_all_trials_of_a_task() -> None:
    assert (
        expected(trial("hificl"), trial("hificl", seed=1)).hours["vision"] == expected(trial("hificl")).hours["vision"]
    )


def test_hours_fall_with_what_a_gpu_does() -> None:
    slow, fast = (expected(trial("hificl"), rates=Rates(utilisation=share)).total for share in (0.2, 0.4))
    assert slow == pytest.approx(2 * fast)


def test_what_trains_vision_costs_more_than_what_leaves_it() -> None:
    assert expected(trial("lora")).hours["training"] > 2 * expected(trial("hificl")).hours["training"]


def test_demonstrations_cost_at_evaluation() -> None:
    def untrained(method: str, **options: Any) -> float:
        made = trial(method, epochs=0, options=options)
        return expected(made).hours["evaluation"]

    assert untrained("icl-k", num_shots=8) > untrained("icl-k", num_shots=4) > untrained("zero-shot")


def test_an_architecture_without_a_formula_is_named_and_left_out() -> None:
    found = expected(trial("hificl", backbone="qwen3-vl-8b"), trial("hificl"))
    assert list(found.not_counted) == ["qwen3-vl-8b"]
    assert found.hours["training"] > 0


def test_a_study_is_planned_without_weights_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    one, eight = (plan("hificl-table1", gpus=gpus, rates=Rates()) for gpus in (1, 8))
    assert one["gpu_hours"] == pytest.approx(sum(one["gpu_hours_by_part"].values()))
    assert one["wall_hours"] == pytest.approx(8 * eight["wall_hours"])
    assert {IDEFICS2, "llava-interleave-7b"} == one["gpu_hours_by_method"].keys()


def test_a_mixture_is_scored_on_each_of_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    assumed = plan("miniature-together", gpus=1, rates=Rates(), overrides=["subsample.num_train=3000"])["assumed"]
    scored, drawn = assumed["evaluation_samples"], assumed["images_a_task"]
    mixture = "vqav2+okvqa+coco"
    assert scored[mixture] == sum(scored[task] for task in mixture.split("+"))
    assert drawn[mixture] == 3000 + 500


@pytest.mark.parametrize(
    ("study", "gpus", "share", "named"),
    [
        ("hificl-table", 1, 0.4, "hificl-table"),
        ("hificl-table1", 0, 0.4, "--gpus"),
        ("hificl-table1", 1, 2.0, "--util"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    monkeypatch: pytest.MonkeyPatch, study: str, gpus: int, share: float, named: str
) -> None:
    monkeypatch.chdir(PROJECT)
    with pytest.raises(InputError, match=named):
        plan(study, gpus=gpus, rates=Rates(utilisation=share))
