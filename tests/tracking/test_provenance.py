from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from pipeline.tracking.provenance import checkout_state, process_is_gone, process_tags, provenance, refused
from tests.support import odd_paths

LOCK = """
schema: '2.0'
stages:
  world:
    cmd: python -m stages.world
    outs:
    - {path: data/world, md5: 11111111111111111111111111111111.dir}
  report:
    cmd: python -m stages.report
    outs:
    - {path: reports, md5: 22222222222222222222222222222222.dir}
"""


def git(root: Path, *arguments: str) -> None:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "params.yaml").write_text("rank: 8\n")
    (tmp_path / "dvc.lock").write_text(LOCK)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "metrics.json").write_text("{}")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_the_digest_of_the_parameters_is_of_profiles_and_studies_too(checkout: Path) -> None:
    found = {provenance(checkout).data.params}
    for folder in ("profiles", "studies"):
        (checkout / folder).mkdir()
        for text in ("a: 1", "a: 2"):
            (checkout / folder / "own.yaml").write_text(text)
            found.add(provenance(checkout).data.params)
    assert len(found) == 5


def test_a_clean_checkout_has_its_commit_and_digests(checkout: Path) -> None:
    found = provenance(checkout)
    assert len(found.commit) == 40
    assert found.dirty is False
    assert found.diff == ""
    assert found.data.params == hashlib.md5(b"rank: 8\n").hexdigest()  # noqa: S324
    assert found.data.outs == {"data/world": "1" * 32 + ".dir", "reports": "2" * 32 + ".dir"}
    assert found.versions["torch"]


def test_what_repro_itself_rewrites_is_no_dirt(checkout: Path) -> None:
    (checkout / "dvc.lock").write_text(LOCK + "# rewritten\n")
    (checkout / "reports" / "metrics.json").write_text('{"a": 1}')
    assert provenance(checkout).dirty is False


def test_an_edit_and_a_new_file_are_dirt_and_the_edit_is_kept(checkout: Path) -> None:
    (checkout / "params.yaml").write_text("rank: 16\n")
    (checkout / "new.py").write_text("x = 1\n")
    found = provenance(checkout)
    assert found.dirty is True
    assert found.changed == ("new.py", "params.yaml")
    assert "+rank: 16" in found.diff


def test_in_a_folder_of_a_larger_checkout_paths_are_its_own(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    project = tmp_path / "project"
    project.mkdir()
    (project / "dvc.lock").write_text(LOCK)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    (project / "dvc.lock").write_text(LOCK + "# more\n")
    (tmp_path / "outside.txt").write_text("not ours")
    assert checkout_state(project).dirty is False


@pytest.mark.parametrize("with_git", [False, True])
def test_without_a_commit_it_says_so(tmp_path: Path, with_git: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if with_git:
        git(tmp_path, "init", "-q")
    found = provenance(tmp_path)
    assert found.commit is None
    assert found.dirty is None
    assert found.note == ("the git checkout has no commit yet" if with_git else "not a git checkout")


def test_a_checkout_of_another_user_is_read_and_what_lies_around_it_is_not(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "params.yaml").write_text("rank: 16\n")
    (checkout / "inner").mkdir()
    before = checkout_state(checkout)
    assert refused(checkout) is None
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its own tests
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    assert "dubious ownership" in refused(checkout)
    assert checkout_state(checkout) == before
    assert before.commit and "+rank: 16" in before.diff
    note = checkout_state(checkout / "inner").note
    assert note.startswith("git refuses: detected dubious ownership")
    assert f"git config --global --add safe.directory {checkout}" in note


def test_a_missing_git_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert checkout_state(checkout).note == "git is not installed"


@pytest.mark.parametrize("name", odd_paths.NAMES)
def test_a_checkout_of_any_name_is_read(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    root.mkdir()
    git(root, "init", "-q")
    (root / name).write_text("one\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    (root / name).write_text("two\n")
    found = checkout_state(root)
    assert found.changed == (name,)
    assert "+two" in found.diff


def test_an_edit_of_the_same_second_and_size_is_kept(checkout: Path) -> None:
    """Git tells it by the age of its index alone."""
    (checkout / "params.yaml").write_text("rank: 9\n")
    assert "+rank: 9" in checkout_state(checkout).diff


def test_an_ended_process_is_gone_and_a_living_one_is_not() -> None:
    mine = process_tags()
    assert not process_is_gone(mine)
    assert process_is_gone({**mine, "owner.started": "1"}), "the id was given to another process since"
    assert process_is_gone({**mine, "owner.boot": "another boot"})
    assert not process_is_gone({**mine, "owner.host": "another host", "owner.pid": "999999999"})
    assert not process_is_gone({}), "a run that is not ours is left alone"


SECRETS = {
    ".env": "HF_TOKEN=hf_SECRETSECRET123\nPASSWORD=hunter2\n",
    "notes/secrets.yaml": "password: hunter2",
    "credentials.py": "x = 'hunter2'",
    "pipeline/methods.py": "URI = 'postgresql://mlflow:hunter2@db/mlflow'\n",
    "studies/own.yaml": "title: hf_abcdefghijklmnopqrstuvwx1234\n",
    "pipeline/key.py": "KEY = '''-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2'''\n",
    "pipeline/aws.json": '{"id": "AKIAIOSFODNN7EXAMPLE", "key": "hunter2"}',
}


@pytest.mark.parametrize("name", SECRETS)
def test_no_secret_is_in_the_diff_and_what_is_left_out_is_named(checkout: Path, name: str) -> None:
    for path, text in {
        name: SECRETS[name],
        "pipeline/adapters/own.py": "x = 1\n",
        "profiles/own.yaml": "a: 1\n",
    }.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(text)
    (checkout / "params.yaml").write_text("rank: 16\n")
    code = checkout_state(checkout)
    assert code.left_out == (name,) and name in code.changed
    assert "hunter2" not in code.diff and "hf_" not in code.diff
    assert "+rank: 16" in code.diff and "+x = 1" in code.diff and "+a: 1" in code.diff


def test_a_secret_that_is_taken_out_is_not_in_the_diff_either(checkout: Path) -> None:
    (checkout / "params.yaml").write_text("tracking: {uri: 'https://admin:hunter2@mlflow.example.org'}\n")
    git(checkout, "commit", "-q", "-a", "-m", "a mistake")
    (checkout / "params.yaml").write_text("tracking: {}\n")
    code = checkout_state(checkout)
    assert code.changed == code.left_out == ("params.yaml",) and code.diff == ""
