"""Ray's first start fails, as on a busy machine: whichever stage it is says so in a line and starts it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.e2e.conftest import environment, make_project

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

# Python runs it at its start. The first driver finds a file in the place of Ray's folder, the second takes it away.
IN_THE_WAY = """
import os, sys
if "pipeline.pool.driver" in sys.orig_argv:
    first, ray = os.environ["FIRST"], os.path.join(os.environ["RAY_TMPDIR"], "ray")
    os.unlink(first if os.path.exists(first) else ray)
"""


def test_a_stage_survives_a_start_of_ray_that_fails(tmp_path):
    project = make_project(tmp_path / "project")
    project.change(lambda raw: raw["studies"]["small"].update(methods={"hificl": None}))
    project.python("-m", "stages.subsample")
    (tmp_path / "sitecustomize.py").write_text(IN_THE_WAY)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    for stage in ("train", "evaluate"):
        (tmp_path / "first").touch()
        with tempfile.TemporaryDirectory(dir="/tmp") as short:
            (Path(short) / "ray").touch()
            own = {"PYTHONPATH": path, "FIRST": str(tmp_path / "first"), "RAY_TMPDIR": short}
            done = subprocess.run(
                [sys.executable, "-m", f"stages.{stage}"], cwd=project.folder, capture_output=True, text=True,
                check=False, env={**environment(), **own}, timeout=600,
            )  # fmt: skip
            assert (Path(short) / "ray").is_dir(), "the second start made it"
        assert done.returncode == 0, done.stderr[-4000:]
        lines = [line for line in done.stderr.splitlines() if "is lost" in line]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith(f"the driver of stage {stage} is lost: why ") and "/ray" in lines[0]
        assert lines[0].endswith("attempt 1")
        assert "Traceback" not in done.stderr, done.stderr
    (cell,) = json.loads((project.folder / "evaluations/studies/small.json").read_text())["cells"]
    assert cell["status"] == "done"
