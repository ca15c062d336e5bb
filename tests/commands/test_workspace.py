"""A folder that runs another profile beside this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.core.errors import InputError
from pipeline.workspace import dvc, make_workspace
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("profile", "first", "takes_checkpoints"),
    [("mini-claims", "world", True), ("real-check", "official", False)],
)
def test_it_has_the_stages_that_its_data_need(tmp_path: Path, monkeypatch, profile, first, takes_checkpoints) -> None:
    monkeypatch.chdir(ROOT)
    data = None if takes_checkpoints else tmp_path
    for _ in range(2):  # a second time changes nothing
        make_workspace(tmp_path / "beside", profile=profile, data=data)
        stages = yaml.safe_load((tmp_path / "beside/dvc.yaml").read_text())["stages"]
        assert next(iter(stages)) == first and "backbone" not in stages
        assert ("official" in stages) == (data is not None)
        assert ("checkpoints" in stages["train"]["deps"]) == takes_checkpoints
    lines = [(path / "params.yaml").read_text().splitlines() for path in (ROOT, tmp_path / "beside")]
    changed = [(before, after) for before, after in zip(*lines, strict=True) if before != after]
    assert [after.partition("#")[0].strip() for _, after in changed] == [f"profile: {profile}"]
    assert all(after.partition("#")[2] == before.partition("#")[2] for before, after in changed)
    assert (tmp_path / "beside/checkpoints").resolve() == ROOT / "checkpoints"


def test_unknown_profiles_and_missing_data_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="unknown profile 'mini-claim'.*mini-claims"):
        make_workspace(tmp_path / "beside", profile="mini-claim")
    with pytest.raises(InputError, match="no such folder"):
        make_workspace(tmp_path / "beside", profile="real", data=tmp_path / "nowhere")
    assert not (tmp_path / "beside").exists()


def test_a_link_in_the_data_that_leads_nowhere_is_named_before_any_work(tmp_path: Path, monkeypatch) -> None:
    """DVC reads every file below its dependencies, and says no more than Errno 2."""
    monkeypatch.chdir(ROOT)
    data = tmp_path / "data"
    (data / "vqav2").mkdir(parents=True)
    (data / "round").symlink_to(data)  # a circle is no fault
    make_workspace(tmp_path / "fine", profile="real-check", data=data)
    (data / "vqav2/old").symlink_to("/nowhere/old-annotations")
    with pytest.raises(InputError, match=r"data/vqav2/old: is a link to /nowhere/old-annotations, which is not there"):
        make_workspace(tmp_path / "beside", profile="real-check", data=data)
    assert not (tmp_path / "beside").exists()


def test_dvc_finds_the_python_that_it_was_started_with(tmp_path, monkeypatch):
    (tmp_path / "say.py").write_text("import pathlib, sys; pathlib.Path('where').write_text(sys.prefix)")
    (tmp_path / "dvc.yaml").write_text("stages: {one: {cmd: python say.py, outs: [where]}}")
    monkeypatch.setenv("PATH", os.defpath)
    dvc(tmp_path, "init", "--no-scm", "--quiet")
    dvc(tmp_path, "repro", "--quiet")
    assert (tmp_path / "where").read_text() == sys.prefix
