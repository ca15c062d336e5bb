"""`hificl study`: one study of params.yaml from its trials to its report, beside the profile's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import report
from pipeline.config import Params
from pipeline.errors import InputError, WorkError, nearest
from pipeline.report import tracked
from pipeline.sweep.evaluation import evaluate
from pipeline.sweep.run import places, sweep


def run(studies: list[str], params: Params, root: Path) -> dict[str, Any]:
    """Train, evaluate and report studies; what is done already is not done again.

    Returns:
        The report's files by study, and the page.

    Raises:
        InputError: unknown study, or inputs that are not in order.
        WorkError: some trials failed; the others are done.
    """
    for name in studies:
        if name not in params.studies:
            raise InputError(f"unknown study '{name}'", way_out=nearest(name, params.studies))
    _draw_samples(params, root)
    sweep(params, studies, root)
    evaluate(params, studies, root)
    evaluations, out = root / "evaluations", root / "reports"
    for name in studies:
        report.write_study(name, params, evaluations, out)
    page = report.write_index(params, evaluations, out)
    tracked.log(params, evaluations, root)
    return {"page": str(page), "studies": {name: [f"{out / name}.{end}" for end in ("md", "csv")] for name in studies}}


def _draw_samples(params: Params, root: Path) -> None:
    """Let DVC draw the samples that are not there yet: on a fresh clone a study is one command too."""
    missing = [task for task in params.run.tasks if not places(root).manifest(task).is_file()]
    if not missing or not (root / ".dvc").is_dir():
        return
    stages = [f"subsample@{task}" for task in missing]
    if subprocess.run([sys.executable, "-m", "dvc", "repro", *stages], cwd=root, check=False).returncode:
        raise WorkError(f"`dvc repro {' '.join(stages)}` failed", where=str(root))
