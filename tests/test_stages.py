"""What every DVC stage does around its work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import FOLDERS
from tests.conftest import ROOT

STAGE = """
from pathlib import Path
from stages.common import run
def stage(params):
    for name in {edited!r}:
        path = Path(name)
        path.write_text(path.read_text() + "# edited\\n")
run(stage)
"""


@pytest.mark.parametrize(
    ("edited", "status"),
    [([], 0), (["params.yaml"], 1), (["profiles/mini.yaml"], 1), (["studies/hificl-table1.yaml", "params.yaml"], 1)],
)
def test_a_stage_whose_parameters_changed_while_it_ran_fails_at_its_end(tmp_path: Path, edited, status) -> None:
    """DVC reads the parameters when a stage ends, and would lock values that were not used."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for kind in FOLDERS:
        shutil.copytree(ROOT / kind, tmp_path / kind)
    done = subprocess.run(
        [sys.executable, "-c", STAGE.format(edited=edited)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.strip().splitlines() or [""]
    assert all(name in line for name in edited) and ("changed while the stage ran" in line) == bool(edited)
