"""params.yaml, profiles/ and studies/: what lies over what, what DVC may write, and mistakes named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import FOLDERS, OWN, load
from pipeline.core.errors import InputError
from pipeline.plan.plan import as_given
from pipeline.plan.space import cells
from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for kind in FOLDERS:
        shutil.copytree(ROOT / kind, tmp_path / kind)
    return tmp_path


def changed(project: Path, section: str, values: dict) -> Path:
    path = project / "params.yaml"
    raw = yaml.safe_load(path.read_text())
    raw[section] = {**(raw.get(section) or {}), **values}
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml")))
def test_the_shipped_params_are_valid_for_every_profile(project, profile):
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("profile: mini ", f"profile: {profile} "))
    assert load(path).profile == profile == load(ROOT / "params.yaml", profile=profile).profile


def test_the_profile_lies_over_the_defaults_and_what_is_set_over_the_profile(project):
    params = load(ROOT / "params.yaml")
    assert params.run.train["micro_batch_size"] == params.train.micro_batch_size == 8
    assert params.train.weight_decay == 0.05  # untouched by the profile
    assert load(ROOT / "params.yaml", overrides=["train.micro_batch_size=3"]).train.micro_batch_size == 3
    assert load(changed(project, "train", {"micro_batch_size": 3})).train.micro_batch_size == 3
    assert load(changed(project, "train", {"micro_batch_size": None})).train.micro_batch_size == 8


def test_a_profile_extends_another():
    claims, mini = (load(ROOT / "params.yaml", profile=name) for name in ("mini-claims", "mini"))
    assert claims.run.studies != mini.run.studies and claims.train == mini.train
    with pytest.raises(InputError, match="profile 'b'.*extends itself"):
        load(ROOT / "params.yaml", ["profiles.a={extends: b}", "profiles.b={extends: a}"], profile="a")
    with pytest.raises(InputError, match=r"extends unknown profile 'minni'.*Did you mean 'mini'"):
        load(ROOT / "params.yaml", ["profiles.a={extends: minni}"], profile="a")


def test_a_whole_profile_may_stand_in_the_file(tmp_path):
    """As before there were profiles/; the records of runs are rerun so. Its sections lie below the profile."""
    run = {"backbones": ["b"], "tasks": ["t"], "studies": ["s"], "train": {"epochs": 2}}
    study = {"title": "t", "backbones": ["b"], "tasks": ["t"], "methods": {"hificl": None}}
    raw = {"profiles": {"own": run}, "run": run, "studies": {"s": study}, "train": {"epochs": 7, "accumulation": 4}}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    params = load(path)
    assert (params.profile, params.train.epochs, params.train.accumulation) == ("own", 2, 4)
    assert params.explicit.train == {} and load(path, ["train.epochs=9"]).train.epochs == 9
    path.write_text(yaml.safe_dump({**raw, "profiles": {"own": run, "other": {**run, "train": {"epochs": 3}}}}))
    other = load(path, profile="other")
    assert (other.profile, other.train.epochs, other.train.accumulation) == ("other", 3, 4)
    with pytest.raises(InputError, match="unknown profile 'others'.*Did you mean 'other'"):
        load(path, profile="others")
    spelt_out = {**raw, "protocol": "published", "train": {"loss_span": "answer"}}
    path.write_text(yaml.safe_dump(spelt_out))
    assert load(path).train.loss_span == load(path).run.train["loss_span"] == "sequence"  # and below a protocol
    path.write_text(yaml.safe_dump({**raw, "profile": "own"}))
    with pytest.raises(InputError, match="both `profile` and `run`"):
        load(path)


@pytest.mark.parametrize(
    ("value", "line"),
    [("0.001", "  learning_rate: 0.001"), ("1e-5", "  learning_rate: 1e-05"), ("null", None)],
)
def test_dvc_writes_one_line_and_every_profile_still_loads(project, value, line):
    """What `dvc exp run -S` does to the file."""
    before = (project / "params.yaml").read_text().splitlines()
    code = "import sys; from dvc.utils.hydra import apply_overrides; apply_overrides('params.yaml', sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, f"train.learning_rate={value}"], cwd=project, check=True)
    after = (project / "params.yaml").read_text().splitlines()
    assert len(after) == len(before)
    assert [new.split("#")[0].rstrip() for old, new in zip(before, after) if old != new] == ([line] if line else [])
    for path in (project / "profiles").glob("*.yaml"):
        params = load(project / "params.yaml", profile=path.stem)
        assert params.explicit.train == ({"learning_rate": float(value)} if line else {})


def test_dvc_watches_every_section_and_those_who_use_weights_where_they_lie():
    sections, dvc = (yaml.safe_load((ROOT / name).read_text()) for name in ("params.yaml", "dvc.yaml"))
    watched = {name: {one.partition(".")[0] for one in of.get("params", [])} for name, of in dvc["stages"].items()}
    assert set(OWN) | {"profile", "protocol"} == set(sections) == set().union(*watched.values())
    assert "backbones" in watched["train"] and "backbones" in watched["evaluate"]


@pytest.mark.parametrize("kind", ["profiles", "studies"])
@pytest.mark.parametrize("name", ["my study", "Größe", "a/b", "-x", "x;y", ""])
def test_a_name_that_cannot_be_a_files_is_refused_at_once(project, kind, name):
    with pytest.raises(InputError, match="cannot be the name of one of the .*letters"):
        load(changed(project, kind, {name: yaml.safe_load((ROOT / "studies/hificl-table1.yaml").read_text())}))


def test_names_with_dots_are_fine(project):
    shutil.copy(project / "studies/hificl-table1.yaml", project / "studies/lora-lr-0.01.yaml")
    assert "lora-lr-0.01" in load(project / "params.yaml").studies


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("train", {"learning_rat": 0.1}), ["unknown key 'train.learning_rat'", "learning_rate"]),
        (("sweep", {"scheduler": "ahsa"}), ["sweep.scheduler", "'asha'", "ahsa"]),
        (("train", {"epochs": 0}), ["train.epochs", "greater than or equal to 1", "0"]),
        (("studdies", {}), ["unknown key 'studdies'", "studies"]),
        (("evaluate", {"generation": {"num_beam": 3}}), ["num_beam", "num_beams"]),
        (("subsample", {"num_evaluation": "hole"}), ["subsample.num_evaluation", "hole", "whole"]),
    ],
)
def test_a_mistake_is_named_with_the_way_out(project, change, words):
    path = changed(project, *change)
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("profiles/mini.yaml", ("micro_batch_size: 8", "micro_batch: 8"), ["micro_batch'", "micro_batch_size"]),
        ("profiles/mini.yaml", ("tasks:", "task:"), ["profile 'mini'", "tasks"]),
        ("profiles/mini.yaml", ("icl-16:", "icl-17:"), ["hificl-table1", "icl-17", "icl-16"]),
        ("studies/hificl-table2.yaml", ("methods:", "method:"), ["studies.hificl-table2", "method"]),
        ("profiles/real.yaml", ("backbones:", "backbones: ["), ["profiles/real.yaml", "YAML"]),
    ],
)
def test_a_mistake_in_a_profile_or_study_is_found(project, file, change, words):
    path = project / file
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(InputError) as caught:
        load(project / "params.yaml")
    for word in words:
        assert word in str(caught.value)


def test_a_row_that_a_profile_cannot_run_is_run_by_one_that_extends_it():
    rows = {
        name: {cell.row for cell in cells(params, "hificl-table1", as_given(params))}
        for name in ("mini", "mini-world2")
        for params in [load(ROOT / "params.yaml", profile=name)]
    }
    assert rows["mini-world2"] - rows["mini"] == {"icl-16", "icl-32"}
    note = load(ROOT / "params.yaml", profile="mini-world2").studies["hificl-table1"].notes()
    assert "16-shot" not in (note or "")


@pytest.mark.parametrize("text", ["run: [", "- a", "\x00"])
def test_no_yaml_is_said_so(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="params.yaml"):
        load(path)


def test_a_missing_file_is_said_so():
    with pytest.raises(InputError, match="no such file"):
        load(Path("nowhere/params.yaml"))


def test_the_data_folder_is_one_that_dvc_sees(monkeypatch):
    from pipeline.config.load import data_root

    monkeypatch.setenv("HIFICL_DATA_ROOT", "/nowhere")
    with pytest.raises(InputError, match="HIFICL_DATA_ROOT.*data/miniature"):
        data_root(load(ROOT / "params.yaml"))


def test_the_profiles_own_studies_come_first_and_the_others_in_natural_order():
    names = list(load(ROOT / "params.yaml").studies)
    assert names[:2] == ["hificl-table1", "hificl-figure7"] and names.index("hificl-figure4") < names.index(
        "hificl-figure10"
    )
