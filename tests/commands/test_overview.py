"""`hificl studies`: every study's trials, done and open, and everything that they start from read once."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import backbones
from pipeline.commands.studies import overview
from pipeline.config.load import load
from pipeline.data.manifest import Manifest
from pipeline.data.sample import ImageRef, Sample
from pipeline.plan.plan import all_cells, make_plan, places
from pipeline.records.store import TrialStore
from pipeline.records.trial import TrialEnd
from tests.conftest import ROOT


def _manifest(task: str, root: Path) -> Manifest:
    def sample(number: int) -> Sample:
        image = ImageRef(f"{number}.png", f"{number:064x}")
        return Sample(task, number, (image,), None, "a", ("a",) * 10)

    sizes = {"train": range(1000), "selection": range(1000, 1300), "evaluation": range(1300, 1400)}
    splits = {name: tuple(map(sample, numbers)) for name, numbers in sizes.items()}
    return Manifest(task, 0, (), splits, root)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the miniature's params, weights and manifests; no trial is done."""
    for name in ("params.yaml", "profiles", "studies", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    params = load()
    for task in params.run.tasks:
        _manifest(task, tmp_path).save(places().manifest(task))
    return params


def test_manifests_and_weights_are_read_once_for_all_studies(project, monkeypatch):
    read: Counter[str] = Counter()
    load_manifest, digest_of = Manifest.load, backbones.digest_of
    monkeypatch.setattr(Manifest, "load", lambda path: (read.update([str(path)]), load_manifest(path))[1])
    monkeypatch.setattr(backbones, "digest_of", lambda name, source: (read.update([name]), digest_of(name, source))[1])
    found = overview(project)
    assert sum(state.trials is not None for state in found.studies.values()) > 20
    assert set(read.values()) == {1} and len(read) == len(project.run.tasks) + len(project.run.backbones)


def test_what_is_done_is_counted_and_the_table_says_what_the_record_does(project):
    plan = make_plan(project, all_cells(project, ["hificl-figure7"], places()), places())
    store = TrialStore(places().runs)
    for key in list(plan.trials)[:2]:
        store.open(plan.trials[key])
        store.finish(key, TrialEnd(status="finished"))
    found = overview(project)
    row = found.record()["hificl-figure7"]
    assert row == {
        "title": project.studies["hificl-figure7"].title, "paper": "hificl.figure7", "in_profile": True,
        "trials": 9, "done": 2, "open": 7,
    }  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(*found.shown(), sep="\n")
    lines = console.file.getvalue().splitlines()
    assert next(line for line in lines if line.startswith("* hificl-figure7")).split()[-2:] == ["2", "9"]


def test_a_study_that_cannot_be_laid_out_says_why_and_leaves_the_others(project):
    places().manifest("mini-coco").unlink()
    found = overview(project).record()
    assert "mini-coco" in found["hificl-table3"]["not_ready"] and "trials" not in found["hificl-table3"]
    assert found["miniature-methods"]["trials"] > 0
