"""`profile: real` draws every data set at its official size."""

from __future__ import annotations

import shutil

import pytest

from pipeline import tasks
from pipeline.config.load import load
from pipeline.data.manifest import Manifest
from pipeline.sweep.draw import draw_task
from pipeline.sweep.train import places
from tests.conftest import ROOT
from tests.support.official_sizes import OFFICIAL, write

REAL = load(ROOT / "params.yaml", profile="real")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with all official files below data/real; a gigabyte, so it is not left behind."""
    folder = tmp_path_factory.mktemp("official-sizes")
    write(folder / "data/real", REAL.subsample)
    yield folder
    shutil.rmtree(folder)


def test_the_profile_names_all_tasks_of_the_papers():
    assert set(REAL.run.tasks) == set(OFFICIAL) and REAL.run.data_root == "data/real"
    assert REAL.subsample.of("vqav2").num_evaluation == 10_000
    assert all(REAL.subsample.of(name).num_evaluation == "whole" for name in OFFICIAL if name != "vqav2")


LEFT = {"mme": 1_274, "seed-bench": 12_733, "mmmu-pro": 630}  # of the one test set, as docs/tasks.md says


@pytest.mark.long  # a gigabyte of files
@pytest.mark.parametrize("name", OFFICIAL)
def test_a_data_set_of_the_official_size_is_drawn(name, project, monkeypatch):
    monkeypatch.chdir(project)
    draw_task(REAL, name)
    manifest = Manifest.load(places(project).manifest(name))
    sizes, task = REAL.subsample.of(name), tasks.get(name)
    left = OFFICIAL[name] - (sizes.num_train + sizes.num_selection if task.one_pool else 0)
    evaluation = left if sizes.num_evaluation == "whole" else sizes.num_evaluation
    assert manifest.sizes == {"train": sizes.num_train, "selection": sizes.num_selection, "evaluation": evaluation}
    assert evaluation == LEFT.get(name, evaluation) and not manifest.replaced
    of = {split: {i.path for s in samples for i in s.images} for split, samples in manifest.splits.items()}
    assert sum(map(len, of.values())) == len(set().union(*of.values()))  # no picture in two splits
    if name == "mme":  # an image's two questions stay together
        assert all(2 * len(paths) == len(manifest.splits[split]) for split, paths in of.items())
    if name == "mmmu-pro":
        shown = [len(s.images) for samples in manifest.splits.values() for s in samples]
        assert (len(shown), max(shown)) == (1_730, 7)
    assert all(len(i.sha256) == 64 for s in manifest.splits["evaluation"] for i in s.images)
