"""What a copy that DVC made for an experiment shares with its project."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commands import doctor
from pipeline.config.load import load
from pipeline.core import copies
from stages import official
from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("runs/aaa/done.json", "evaluations/e1.json", "evaluations/measures/m1.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in ("evaluations/studies/small.json", "data/real/vqa/v2.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("the project's")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "weights").symlink_to("elsewhere")
    return tmp_path


@pytest.fixture
def copy(project: Path) -> Path:
    folder = project / ".dvc/tmp/exps/standalone/tmp1"
    folder.mkdir(parents=True)
    return folder


def test_a_copy_trains_into_its_projects_store(project: Path, copy: Path) -> None:
    copies.join(copy)
    copies.join(copy)  # each stage does
    assert (copy / "runs/aaa/done.json").is_file() and (copy / "cache").is_dir() and (copy / "weights").is_dir()
    (copy / "runs/bbb").mkdir()
    (copy / "cache/visual").mkdir()
    assert (project / "runs/bbb").is_dir() and (project / "cache/visual").is_dir()


def test_a_copy_finds_the_official_files(project: Path, copy: Path) -> None:
    copies.link_official(copy)
    assert (copy / "data/real/vqa/v2.json").read_text() == "the project's"
    assert not (copy / "data/real/vqa").is_symlink()  # DVC would not look into it


def test_official_files_behind_a_link_are_linked_as_one(project: Path, copy: Path) -> None:
    (project / "data/real").rename(project / "elsewhere/files")
    (project / "data/real").symlink_to("../elsewhere/files")
    copies.link_official(copy)
    assert (copy / "data/real").is_symlink() and (copy / "data/real/vqa/v2.json").is_file()


def test_evaluations_are_shared_by_content_and_tables_are_not(project: Path, copy: Path) -> None:
    with copies.shared_evaluations(copy):
        assert sorted(path.name for path in (copy / "evaluations").rglob("*.json")) == ["e1.json", "m1.json"]
        (copy / "evaluations/e2.json").write_text("{}")
        (copy / "evaluations/studies").mkdir()
        (copy / "evaluations/studies/small.json").write_text("the experiment's")
    assert (project / "evaluations/e2.json").is_file()
    assert (project / "evaluations/studies/small.json").read_text() == "the project's"


def test_what_an_interrupted_experiment_scored_is_kept(project: Path, copy: Path) -> None:
    with pytest.raises(KeyboardInterrupt), copies.shared_evaluations(copy):
        (copy / "evaluations/e3.json").write_text("{}")
        raise KeyboardInterrupt
    assert (project / "evaluations/e3.json").is_file()


def test_a_project_itself_stays_as_it_is(project: Path) -> None:
    before = sorted(project.iterdir())
    copies.join(project)
    copies.link_official(project)
    with copies.shared_evaluations(project):
        pass
    assert sorted(project.iterdir()) == before and not (project / "cache").exists()


def test_a_copys_project_is_the_folder_that_dvc_keeps_it_in(project: Path, copy: Path) -> None:
    assert copies.main_checkout(copy) == project.resolve() and copies.is_copy(copy)
    assert copies.main_checkout(project) == project.resolve() and not copies.is_copy(project)


@pytest.mark.parametrize("whole", [False, True])
def test_a_link_to_a_folder_is_named_by_the_stage_and_by_the_doctor(project: Path, monkeypatch, capsys, whole) -> None:
    if whole:  # which DVC follows
        (project / "data/real").rename(project / "elsewhere/files")
        (project / "data/real").symlink_to("../elsewhere/files")
    monkeypatch.chdir(project)
    params = load(ROOT / "params.yaml", profile="real")
    (project / "data/real/one.json").symlink_to(project / "params.yaml")  # a file's content DVC reads
    official.main(params)
    assert capsys.readouterr().err == ""
    (project / "data/real/vqa/images").symlink_to(project / "elsewhere")
    official.main(params)
    assert capsys.readouterr().err.startswith("note: data/real/vqa/images is a link to a folder: DVC ")
    (project / "data/real/coco").symlink_to(project / "elsewhere")
    (found,) = (one for one in doctor._data(params, project) if one.name == "links")
    assert found.state == doctor.NOTE and found.detail.startswith("data/real/coco and 1 more are links to folders")
