"""Which backbone plays which part, which rows stand where, and what a profile changes in a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.plan.plan import as_given
from pipeline.plan.space import Digests, cells, points
from pipeline.sweep.train import BY_HAND

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def params():
    return load(ROOT / "params.yaml")


class Any_(dict):
    def __missing__(self, key):
        return "0" * 64


def of(params, study: str):
    return cells(params, study, Digests(Any_(), Any_(), as_given(params).train_sizes))


@pytest.mark.parametrize("backbones", [["mini-idefics2"], ["mini-idefics2", "mini-llava"]])
def test_every_study_lays_out_on_the_miniature(params, backbones):
    here = params.model_copy(update={"run": params.run.model_copy(update={"backbones": backbones})})
    of_others = [load(ROOT / "params.yaml", profile=f"real-weights{part}").run.studies for part in ("", "-words")]
    for study in params.studies.keys() - {*sum(of_others, []), BY_HAND}:
        assert all(cell.trial(point).key for cell in of(here, study) for point in [{}] if not cell.search)


def test_a_backbone_plays_its_own_part_before_another(params):
    assert {cell.paper_backbone for cell in of(params, "mimic-main")} == {"idefics2-8b-base"}
    assert {cell.paper_backbone for cell in of(params, "mimic-table8")} == {"idefics-9b"}
    assert {cell.paper_task for cell in of(params, "mimic-table10")} == {"flickr30k", "mme", "seed-bench"}


def test_a_row_stands_only_where_it_belongs(params):
    rows = {(cell.row, cell.paper_task) for cell in of(params, "mimic-table10")}
    assert ("icl-8", "flickr30k") in rows and ("icl-2", "mme") in rows
    assert ("icl-8", "mme") not in rows and not any(row == "icl-32" for row, _ in rows)


def test_a_profile_lays_its_changes_over_a_study(params, tmp_path):
    assert params.studies["hificl-figure7"].vary == {"rank": [1, 4, 8]}
    assert params.studies["mimic-table9"].train["num_train_samples"] == 1000
    assert set(params.studies["hificl-table1"].without) == {"icl-16", "icl-32"}
    with pytest.raises(InputError, match="hificl-figure9.*Did you mean"):
        load(ROOT / "params.yaml", ["run.study_changes.hificl-figure9={title: x}"])
    with pytest.raises(InputError, match="study_changes.hificl-figure7"):
        load(ROOT / "params.yaml", ["run.study_changes.hificl-figure7={lay: table}"])


def own(text: str, *settings: str):
    study = f"{{title: own, backbones: [idefics2-8b-base], tasks: [vqav2], {text}}}"
    made = load(ROOT / "params.yaml", [f"studies.own={study}", *settings])
    return made, of(made, "own")


@pytest.mark.parametrize("search", ["grid", "random"])
def test_points_equal_in_value_are_one_point(search):
    written = "methods: {hificl: {search: {learning_rate: [1e-3, 0.001, 1.0e-3, 5e-3], rank: [8, 8.0]}}}"
    made, (cell,) = own(written, f"sweep.search={search}", "sweep.num_samples=30")
    found = points(cell, made)
    assert sorted(point["learning_rate"] for point in found) == [0.001, 0.005]
    assert len({cell.trial(point).key for point in found}) == 2


def test_the_bounds_of_a_range_are_numbers_however_they_are_written():
    setting = "methods: {hificl: {search: {learning_rate: {loguniform: [%s]}}}}"
    drawn = [
        [point["learning_rate"] for point in points(cell, made)]
        for bounds in ("1e-5, 5e-3", "0.00001, 0.005")
        for made, (cell,) in [own(setting % bounds, "sweep.search=random", "sweep.num_samples=5")]
    ]
    assert drawn[0] == drawn[1] and all(1e-5 <= rate <= 5e-3 for rate in drawn[0]) and len(set(drawn[0])) == 5
    for bounds in ("'1e-5', '5e-3'", "1e-5, high", "false, true", "1e-5", "5e-3, 1e-5"):
        made, (cell,) = own(setting % bounds, "sweep.search=random")
        with pytest.raises(InputError, match="search domain of 'learning_rate'.*two numbers"):
            points(cell, made)


def test_a_curves_axis_holds_numbers_each_once():
    _, found = own("methods: {hificl: {}}, vary: {learning_rate: [1e-3, '5e-2', 0.001], num_train_samples: [1e2, 200]}")
    assert [tuple(cell.vary.values()) for cell in found] == [(0.001, 100), (0.001, 200), (0.05, 100), (0.05, 200)]
    assert all([type(value) for value in cell.vary.values()] == [float, int] for cell in found)
