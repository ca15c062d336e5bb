"""What MLflow is told of a trial: its loss by step, what its page says, which samples it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.trial import TrialConfig
from pipeline.plan.plan import Places
from pipeline.plan.space import Digests, cells
from pipeline.records.trial import EpochReport
from pipeline.sweep.mlflow_sync import POINTS, curve, metric_points, trial_note, used_by
from pipeline.tracking.records import MetricPoint
from tests.support.plans import make_plan

PLACES = Places(Path("/p/runs"), Path("/p/data/manifests"), None)


def test_a_short_trial_has_every_step_and_a_long_one_the_means_of_equally_many():
    short = {1: [3.0, 2.0], 2: [1.0, 0.5]}
    assert curve(short, 2) == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    assert curve({2: short[2]}, 2) == [(3, 1.0), (4, 0.5)]  # live, one epoch after another
    long = {epoch: [float(epoch * 251 + step) for step in range(251)] for epoch in (1, 2, 3)}
    points = curve(long, 3)
    assert POINTS / 2 < len(points) <= POINTS + 3 and [step for step, _ in points][-1] == 3 * 251
    assert [point for epoch in long for point in curve({epoch: long[epoch]}, 3)] == points
    before, total = 0, 0.0
    for step, mean in points:  # no step is left out or taken twice
        total, before = total + (step - before) * mean, step
    assert total == pytest.approx(sum(sum(values) for values in long.values()))


def test_epochs_and_losses_are_points_of_metrics():
    points = metric_points([EpochReport(epoch=2, train_loss=0.5)], {2: [0.25, 0.75]}, 2)
    assert points == [
        MetricPoint("train_loss", 2, 0.5), MetricPoint("step/train_loss", 3, 0.25),
        MetricPoint("step/train_loss", 4, 0.75),
    ]  # fmt: skip


def config(method: str, **given) -> TrialConfig:
    base = {"backbone": "b", "backbone_digest": "0", "task": "vqav2", "manifest_digest": "1", "num_train_samples": 100}
    return TrialConfig(method=method, **{**base, **given})


def test_a_trials_page_says_what_was_trained_on_what(tmp_path):
    plan = make_plan(tmp_path, 0)
    trained = config("hificl", options={"rank": 4}, epochs=5, micro_batch_size=2, accumulation=2, learning_rate=0.005)
    digests = Digests({"mini-idefics2": "0", "mini-llava": "1"}, {"mini-vqa": "2"}, {"mini-vqa": 100})
    (cell, *_) = [
        one
        for one in cells(plan.params, "hificl-figure7", digests)
        if one.task == "mini-vqa" and one.method == "hificl"
    ]
    plan.cells[cell.name], plan.cell_of[trained.key] = cell, cell.name
    note = trial_note(plan, trained)
    assert "on `b` for `vqav2`, seed 0: trained on 100 samples for 5 epochs, 4 a step, learning rate 0.005" in note
    assert note.startswith(cell.label) and "rank 4" in note and "`hificl-figure7`" in note
    shown = trial_note(plan, config("icl-k", options={"num_shots": 8}))
    assert shown.startswith("icl-k on") and "8 demonstrations before each question" in shown
    for method in ("zero-shot", "task-vector", "mtv", "icv"):  # of the others' demonstrations nothing is left
        assert "no demonstration" in trial_note(plan, config(method))


def test_a_run_names_the_samples_that_it_uses_relative_to_the_project():
    drawn = {"sample_draw": "by-seed", "seed": 3, "epochs": 5, "num_selection_samples": 20}
    training, selection = used_by(config("hificl", **drawn), PLACES)
    assert training.source == selection.source == "data/manifests/vqav2/manifest.json"
    assert (training.name, training.context, training.rows) == ("vqav2/train", "training", 100)
    assert training.samples == "100 of train, by-seed 3"
    assert (selection.name, selection.context, selection.rows) == ("vqav2/selection", "selection", 20)
    chosen_on_test = used_by(config("hificl", epochs=5, selection="test"), PLACES)[1]
    assert (chosen_on_test.name, chosen_on_test.context) == ("vqav2/evaluation", "selection")
    (shown,) = used_by(config("icl-k", options={"num_shots": 8}), PLACES)
    assert (shown.name, shown.context) == ("vqav2/train", "demonstrations")
    assert used_by(config("zero-shot"), PLACES) == []
    assert used_by(config("icv"), PLACES) == [shown]
