"""A study's `source_task`: a row trained on one task, and scored on another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config.load import Params, Study, load
from pipeline.core.errors import InputError, validate
from pipeline.plan.plan import as_given, evaluation_of, make_plan, places
from pipeline.plan.space import Cell, cells, needed, points
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
        scored = evaluation_of(params, cell, config.key)
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
    to_score = plan.request_of(config, evaluation_of(params, cell, config.key))
    assert to_score.manifest.endswith("mini-coco/manifest.json") and to_score.manifest_digest
    to_train = plan.request_of(config)
    assert to_train.manifest.endswith("mini-vqa/manifest.json") and to_train.manifest_digest is None


ALL = "mini-vqa+mini-okvqa+mini-coco"


def test_a_row_may_be_trained_on_a_mixture(monkeypatch):
    params, known = laid_out(monkeypatch, "miniature-together")
    assert needed(params, ["miniature-together"])[1] == ["mini-vqa", "mini-okvqa", "mini-coco", ALL]
    of_row = {row: [cell for cell in known if cell.row == row] for row in ("hificl", "hificl-all", "hificl-all-3000")}
    assert [len(cells) for cells in of_row.values()] == [9, 9, 9] and not any(cell.vary for cell in known)
    for row, samples in (("hificl-all", 1000), ("hificl-all-3000", 3000)):
        trials = {cell.trial({}).key: cell.trial({}) for cell in of_row[row]}
        assert len(trials) == 3  # one a seed, scored on three tasks
        assert {(config.task, config.num_train_samples) for config in trials.values()} == {(ALL, samples)}
        for cell in of_row[row]:
            assert evaluation_of(params, cell, "k").task == cell.task in TASKS
    assert {cell.trial({}).task for cell in of_row["hificl"]} == TASKS


def test_a_mixture_of_which_the_profile_lacks_a_task_is_left_out(monkeypatch):
    params, known = laid_out(monkeypatch, "miniature-together", tasks=["mini-vqa", "mini-coco"])
    assert {cell.row for cell in known} == {"zero-shot", "lora-r16", "mimic", "hificl"}
    assert needed(params, ["miniature-together"])[1] == ["mini-vqa", "mini-coco"]


def test_a_mixture_may_be_what_a_study_scores_on(monkeypatch):
    monkeypatch.chdir(ROOT)  # as the study of what was made by hand does
    params = load(profile="mini")
    mixture = "mini-vqa+mini-coco"
    study = params.studies["hificl-table1"].model_copy(update={"tasks": [mixture]})
    params = params.model_copy(update={"studies": {"own": study}})
    assert needed(params, ["own"])[1] == ["mini-vqa", "mini-coco", mixture]
    digests = as_given(params)
    sizes = {**digests.train_sizes, mixture: 1000}
    known = cells(params, "own", replace(digests, train_sizes=sizes, manifests={mixture: "d"}))
    assert {(cell.task, cell.source) for cell in known} == {(mixture, None)}


def test_a_mixture_is_a_point_of_a_varied_source(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = load(profile="mini")
    source = "okvqa+vqav2"
    study = params.studies["miniature-transfer"].model_copy(update={"vary": {"source_task": ["coco", source]}})
    params = params.model_copy(update={"studies": {"own": study}})
    sources = {cell.vary.get("source_task") for cell in cells(params, "own", as_given(params))}
    assert sources == {None, "mini-coco", "mini-okvqa+mini-vqa"}


def test_a_source_that_the_profile_lacks_is_left_out(monkeypatch):
    _, known = laid_out(monkeypatch, "miniature-transfer", tasks=["mini-vqa", "mini-coco"])
    assert {cell.source_task for cell in known} == {cell.task for cell in known} == {"mini-vqa", "mini-coco"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vary": {"source_task": ["vqav2+mme"]}}, "source_task names 'mme'"),
        ({"methods": {"hificl": {"source_task": "mme"}}}, "source_task names 'mme'"),
        ({"vary": {"source_task": ["mme"]}}, "source_task names 'mme', which is none of the study's tasks"),
        ({"measure": "training_cost"}, "source_task goes with scores alone, not with the measure training_cost"),
    ],
)
def test_what_there_cannot_be_is_refused(change, says):
    study = {"title": "t", "backbones": ["b"], "tasks": ["vqav2"], "methods": {"hificl": None}}
    with pytest.raises(InputError, match=says):
        validate(Study, {**study, "vary": {"source_task": ["vqav2"]}, **change}, "a study")
