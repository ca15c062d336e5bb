"""Scores that are made while other trials train, on a real pool."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.test_sweeps import only

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def scores(project) -> dict[str, tuple[float, list]]:
    """Every score by its key, with its answers."""
    records = {path.stem: json.loads(path.read_text()) for path in (project.folder / "evaluations").glob("*.json")}
    return {key: (record["value"], record["predictions"]) for key, record in records.items()}


def test_a_slot_with_nothing_to_train_scores_what_has_ended_as_it_is_scored_later(tmp_path):
    project = make_project(tmp_path / "project", slots=2)
    project.draw("vqav2")
    only(project, {"set": {"rank": 1}}, {"set": {"rank": 2, "epochs": 300}})
    said = "1 of 2 trials were scored while others trained"
    assert said in project.python("-m", "pipeline", "study", "small", "--set", "sweep.pack=1").stderr
    beside = scores(project)
    assert len(beside) == 2 and not list((project.folder / "cache/scores").glob("*/*"))
    shutil.rmtree(project.folder / "evaluations")
    assert said not in project.python("-m", "stages.evaluate", "--set", "sweep.pack=1").stderr
    assert scores(project) == beside
