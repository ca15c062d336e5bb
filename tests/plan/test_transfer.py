"""A study's `source_task`: a row trained on one task, and scored on another."""

from __future__ import annotations

import pytest

from pipeline.config.load import Params, Study, load
from pipeline.core.errors import InputError, validate
from pipeline.plan.plan import as_given, make_plan, places
from pipeline.plan.space import Cell, cells, points
from pipeline.sweep.evaluate import _evaluation
from tests.conftest import ROOT

TASKS = {"mini-vqa", "mini-okvqa", "mini-coco"}


def laid_out(monkeypatch: pytest.MonkeyPatch, study: str, **changes: object) -> tuple[Params, list[Cell]]:
    monkeypatch.chdir(ROOT)
    params = load(profile="mini")
    run = params.run.model_copy(update=changes)
    params = params.model_copy(update={"run": run})
    return params, cells(params, study, as_given(params))


def test_every_task_is_trained_on_and_scored_on_by_the_trials_of_its_own_study(monkeypatch):
    params, known = laid_out(monkeypatch, "miniature-transfer")
    trained = [cell for cell in known if cell.row != "zero-shot"]
    assert {(cell.source_task, cell.task) for cell in trained} == {(a, b) for a in TASKS for b in TASKS}
    assert len(trained) == 3 * 9 * 3 and len(known) - len(trained) == 3 * 3  # nothing is trained: no source
    trials = {cell.name: cell.trial(point) for cell in known for point in points(cell, params)}
    assert len(trials) == len(known)
    for cell in trained:
        config = trials[cell.name]
        assert config.task == cell.source_task == cell.vary["source_task"]
        scored = _evaluation(params, cell, config.key)
        assert (scored.task, scored.manifest_digest is None) == (
            (None, True) if cell.source is None else (cell.task, False)
        )
    plain = {
        cell.trial({}).key for cell in laid_out(monkeypatch, "hificl-table1")[1] if cell.method in ("lora", "hificl")
    }
    assert plain <= {config.key for config in trials.values()}  # trained once for both


def test_a_score_reads_the_targets_samples(monkeypatch):
    params, known = laid_out(monkeypatch, "miniature-transfer")
    cell = next(cell for cell in known if (cell.source, cell.task) == ("mini-vqa", "mini-coco"))
    plan, config = make_plan(params, known, places(ROOT)), cell.trial({})
    to_score = plan.request_of(config, _evaluation(params, cell, config.key))
    assert to_score.manifest.endswith("mini-coco/manifest.json") and to_score.manifest_digest
    to_train = plan.request_of(config)
    assert to_train.manifest.endswith("mini-vqa/manifest.json") and to_train.manifest_digest is None


def test_a_source_that_the_profile_lacks_is_left_out(monkeypatch):
    _, known = laid_out(monkeypatch, "miniature-transfer", tasks=["mini-vqa", "mini-coco"])
    assert {cell.source_task for cell in known} == {cell.task for cell in known} == {"mini-vqa", "mini-coco"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vary": {"source_task": ["mme"]}}, "vary.source_task names 'mme', which is none of the study's tasks"),
        ({"measure": "training_cost"}, "vary.source_task goes with scores alone, not with the measure training_cost"),
    ],
)
def test_what_there_cannot_be_is_refused(change, says):
    study = {"title": "t", "backbones": ["b"], "tasks": ["vqav2"], "methods": {"hificl": None}}
    with pytest.raises(InputError, match=says):
        validate(Study, {**study, "vary": {"source_task": ["vqav2"]}, **change}, "a study")
