"""How a stage finds the Python that has the packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

OTHER = Path(sys.base_prefix, "bin/python3")  # what `python3` is where the environment is not activated


@pytest.fixture
def project(tmp_path: Path) -> Path:
    if sys.prefix == sys.base_prefix or not OTHER.is_file():
        pytest.skip("these tests run in no environment of their own")
    for name in ("pipeline", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def _report(folder: Path, **variables: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DVC_ROOT")}
    done = subprocess.run(
        [str(OTHER), "-m", "stages.report"], cwd=folder, env={**kept, **variables}, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_a_python_without_the_packages_is_named(project: Path) -> None:
    status, said = _report(project)
    assert status == 2 and said.count("\n") == 1
    assert str(OTHER) in said and "torch" in said and "Activate" in said


def test_the_projects_environment_takes_over(project: Path) -> None:
    (project / ".venv").symlink_to(sys.prefix)
    assert _report(project) == (2, "error: params.yaml: no such file. Run from the project's root\n")


def test_it_takes_over_in_an_experiments_copy_too(project: Path) -> None:
    (project / ".venv").symlink_to(sys.prefix)
    copy = project / ".dvc/tmp/exps/standalone/tmp1"
    copy.mkdir(parents=True)
    for name in ("pipeline", "stages"):
        (copy / name).symlink_to(ROOT / name)
    assert _report(copy)[0] == 2 and "has no" in _report(copy)[1]
    assert "params.yaml: no such file" in _report(copy, DVC_ROOT=str(project))[1]
