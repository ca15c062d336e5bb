"""A run's own record gives the trial again: every row of the miniature has the same key the second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import load
from pipeline.lineage.record import RunRecord
from pipeline.lineage.reproduce import as_then
from pipeline.lineage.rerun import STUDY, _params
from pipeline.records.trial import Provenance
from pipeline.sweep.space import Digests, cells
from tests.conftest import ROOT


class Same(dict):
    def __missing__(self, key):
        return "0" * 64


@pytest.mark.parametrize("study", ["hificl-table1", "miniature-methods", "hificl-figure7"])
def test_the_second_trial_has_the_firsts_key(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = load(ROOT / "params.yaml")
    digests = Digests(Same(), Same(), dict.fromkeys(params.run.tasks, 1000))
    first = [cell.trial({}) for cell in cells(params, study, digests) if not cell.search]
    assert len(first) > 5
    for config in first:
        record = RunRecord("run", config.model_dump(mode="json"), None, {}, Provenance(), {"trial_key": config.key})
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(_params(record, params), sort_keys=False))
        (cell,) = cells(load(file), STUDY, digests)
        assert cell.trial({}).key == config.key, config.method


def test_todays_code_trains_an_old_trial_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = load(ROOT / "params.yaml")
    digests = Digests(Same(), Same(), dict.fromkeys(params.run.tasks, 1000))
    (cell, *_) = (cell for cell in cells(params, "miniature-points", digests) if cell.row == "live-residual")
    config = cell.trial({}).model_dump(mode="json")
    old = {**config, "options": {"magnitude_learning_rate": None}}  # of before there was a point
    file = tmp_path / "params.yaml"
    for record, point in (
        (old, "mlp"),
        (as_then(RunRecord("run", old, None, {}, Provenance(), {})).config, "residual"),
    ):
        run = RunRecord("run", record, None, {}, Provenance(), {})
        file.write_text(yaml.safe_dump(_params(run, params), sort_keys=False))
        (again,) = cells(load(file), STUDY, digests)
        assert again.trial({}).options["point"] == point
