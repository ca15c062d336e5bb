"""A commit's code in a folder of its own, with a dirty tree's diff; on a small repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.core.errors import InputError, WorkError
from pipeline.lineage.rerun import check_code, checked_out
from pipeline.tracking.provenance import checkout_state


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q")
    (root / "code.py").write_text("old = 1\n")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def test_a_dirty_trees_code_comes_back_new_files_included(repository: Path, tmp_path: Path) -> None:
    (repository / "code.py").write_text("edited = 1\n")
    (repository / "weights.bin").write_bytes(bytes(300_000))
    (repository / "pipeline").mkdir()
    (repository / "pipeline/file.py").write_text("added = 1\n")
    made_by = checkout_state(repository)
    index = git(repository, "status", "--porcelain")
    git(repository, "stash", "-uq")
    (repository / "code.py").write_text("later = 1\n")
    git(repository, "commit", "-qam", "second")
    assert made_by.left_out == ("weights.bin",)
    check_code(repository, made_by, "run")
    with checked_out(repository, made_by, tmp_path / "code") as code:
        assert (code / "code.py").read_text() == "edited = 1\n"
        assert (code / "pipeline/file.py").read_text() == "added = 1\n"
    assert "?? pipeline/" in index
    assert not (tmp_path / "code").exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"commit": None, "note": "not a git checkout"}, "not a git checkout"),
        ({"commit": "0" * 40}, "is not in this repository"),
        ({"dirty": True, "diff": "", "changed": ["big.py"]}, "big.py"),
        ({"dirty": True, "diff": "x\n(cut off: 9 characters)\n"}, "not kept whole"),
    ],
)
def test_code_that_cannot_be_had_is_said(repository: Path, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_code(repository, checkout_state(repository).model_copy(update=change), "run")


def test_a_diff_that_does_not_fit_is_a_failure_of_work_and_leaves_nothing(repository: Path, tmp_path: Path) -> None:
    broken = checkout_state(repository).model_copy(update={"dirty": True, "diff": "no diff\n"})
    with pytest.raises(WorkError, match="git apply"), checked_out(repository, broken, tmp_path / "code"):
        pass
    assert len(git(repository, "worktree", "list").splitlines()) == 1
