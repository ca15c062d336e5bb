"""The time left of a sweep, from what its epochs took by method."""

from __future__ import annotations

import time

import pytest

from pipeline.config.trial import TrialConfig
from pipeline.plan.plan import Places, Plan
from pipeline.records.trial import EpochReport
from pipeline.sweep.view import TimeLeft, View


class Clock:
    now = 100.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    return made


def _trial(method: str, **changed: object) -> TrialConfig:
    values = {"backbone": "b", "backbone_digest": "x", "task": "mini-vqa", "manifest_digest": "m", "method": method}
    return TrialConfig(**{**values, "epochs": 2, "num_train_samples": 100, **changed})


def test_each_method_counts_at_its_own_seconds(clock: Clock) -> None:
    trials = {"a": _trial("live"), "b": _trial("live", num_train_samples=50), "c": _trial("lora"), "d": _trial("mimic")}
    pace = TimeLeft(trials)
    assert pace.left() is None
    clock.pass_(10)
    pace.on_epoch("a", 1, 8.0)
    # 8 s a hundred samples for all, 100 + 100 + 200 + 200 samples to come; the 2 s before it began come once
    assert pace.left() == pytest.approx(8.0 * 6)
    clock.pass_(2)
    pace.on_epoch("c", 1, 1.0)
    # LIVE 0.08 a sample, LoRA 0.01; MimIC, not seen yet, at the mean of both
    assert pace.left() == pytest.approx(10 / 9 * (0.08 * 200 + 0.01 * 100 + 0.045 * 200))
    for key in trials:
        pace.on_end(key)
    assert pace.left() == 0


def test_a_trial_that_ends_early_and_one_that_goes_on_count_what_they_have_left(clock: Clock) -> None:
    pace = TimeLeft({"stopped": _trial("lora", epochs=10), "resumed": _trial("lora", epochs=10)})
    pace.on_epoch("stopped", 1, 1.0)
    clock.pass_(2)
    pace.on_epoch("resumed", 8, 1.0)
    pace.on_epoch("resumed", 8, 1.0)  # again, after its slot was lost
    assert pace.left() == pytest.approx(9 + 2)
    pace.on_end("stopped")
    assert pace.left() == pytest.approx(2)


def test_points_to_be_asked_for_count_as_those_that_ended(clock: Clock) -> None:
    pace = TimeLeft({}, points=4)
    pace.on_epoch("p", 1, 2.0)
    assert pace.left() is None
    clock.pass_(4)
    pace.on_epoch("p", 2, 1.0)
    pace.on_end("p")
    assert pace.left() == pytest.approx(6 / 3 * 3 * 3)


def test_the_line_tells_all_points_and_survives_a_failure(
    clock: Clock, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(None, Places(tmp_path, tmp_path, None), trials={"a": _trial("lora"), "b": _trial("lora")})
    with View(plan, ["a"], points=2) as view:
        view.on_start("a")
        clock.pass_(20)
        view.on_report("a", EpochReport(epoch=1, seconds=20.0, objective=50.0))
        view.on_start("asked")
        clock.pass_(20)
        view.on_report("asked", EpochReport(epoch=1, seconds=20.0))
        view.on_end("asked", "out of memory")
    said = capsys.readouterr().err
    assert "trials: 0 of 3 done, 1 running, best accuracy 50, ? left" in said
    assert "trial asked failed: out of memory" in said
    assert said.splitlines()[-1] == "trials: 1 of 3 done, 1 failed, 1 running, best accuracy 50, 40 s left"
