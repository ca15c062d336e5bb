"""Which backbone plays which part, which rows stand where, and what a profile changes in a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.errors import InputError
from pipeline.sweep.space import Digests, cells

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def params():
    return load(ROOT / "params.yaml")


class Any_(dict):
    def __missing__(self, key):
        return "0" * 64


def of(params, study: str):
    return cells(params, study, Digests(Any_(), Any_(), dict.fromkeys(params.run.tasks, 1000)))


@pytest.mark.parametrize("backbones", [["mini-idefics2"], ["mini-idefics2", "mini-llava"]])
def test_every_study_lays_out_on_the_miniature(params, backbones):
    here = params.model_copy(update={"run": params.run.model_copy(update={"backbones": backbones})})
    for study in params.studies:
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
