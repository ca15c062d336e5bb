"""A run's own record gives the trial again: every row of the miniature has the same key the second time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline import methods
from pipeline.config.load import load
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core.errors import InputError
from pipeline.lineage.rerun import STUDY, study_params, surroundings
from pipeline.lineage.run_record import RunRecord
from pipeline.plan.plan import evaluation_of
from pipeline.plan.space import Digests, cells
from pipeline.records.trial import Provenance
from pipeline.sweep import recorded
from tests.conftest import ROOT


class Same(dict):
    def __missing__(self, key):
        return "0" * 64


@pytest.fixture
def params(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load(ROOT / "params.yaml")


def digests_of(params):
    return Digests(Same(), Same(), dict.fromkeys(params.run.tasks, 1000))


def record_of(config: TrialConfig, evaluation: dict | None = None) -> RunRecord:
    return RunRecord("run", config.model_dump(mode="json"), evaluation, {}, Provenance(), {"trial_key": config.key})


def loaded(raw: dict, tmp_path: Path):
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    return load(file)


@pytest.mark.parametrize("study", ["hificl-table1", "miniature-methods", "hificl-figure7"])
def test_the_second_trial_has_the_firsts_key(study: str, params, tmp_path: Path) -> None:
    digests = digests_of(params)
    first = [cell.trial({}) for cell in cells(params, study, digests) if not cell.search]
    assert len(first) > 5
    for config in first:
        record = record_of(config)
        own = surroundings(record, params)
        (cell,) = cells(loaded(study_params(record, own), tmp_path), STUDY, digests)
        assert cell.trial({}).key == config.key, config.method
        (tmp_path / "trial.json").write_text(json.dumps(record.config))
        whole = recorded.params_of(recorded.read_recorded(tmp_path / "trial.json"), loaded(own, tmp_path))
        (cell,) = cells(whole, recorded.STUDY, digests)
        assert cell.trial({}) == config


def test_a_recorded_trial_is_scored_as_its_record_says_and_no_setting_reaches_it(params, tmp_path: Path) -> None:
    (cell, *_) = cells(params, "hificl-table1", digests_of(params))
    config = cell.trial({})
    scored = EvaluationConfig(trial="of old", num_samples=7, num_beams=3, length_penalty=0.5, max_new_tokens=4)
    (tmp_path / "config.json").write_text(json.dumps({"config": config.model_dump(mode="json"), "provenance": {}}))
    (tmp_path / "score.json").write_text(json.dumps({"evaluation": scored.model_dump(mode="json"), "value": 1}))
    trial = recorded.read_recorded(tmp_path / "config.json", tmp_path / "score.json")
    explicit = load(ROOT / "params.yaml", ["train.epochs=3", "evaluate.num_evaluation_samples=2", "sweep.slots=1"])
    again = recorded.params_of(trial, explicit)
    (cell,) = cells(again, recorded.STUDY, digests_of(params))
    assert cell.trial({}) == config and again.sweep.slots == 1
    assert evaluation_of(again, cell, "new") == scored.model_copy(update={"trial": "new"})


def test_other_weights_and_damaged_records_are_refused_before_any_work(params, tmp_path: Path) -> None:
    (cell, *_) = cells(params, "hificl-table1", digests_of(params))
    config = cell.trial({}).model_dump(mode="json")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, "backbone_digest": "1" * 64}))
    again = recorded.params_of(recorded.read_recorded(file), params)
    with pytest.raises(InputError, match="weights of mini-idefics2 have digest 0{12}, .* recorded with 1{12}"):
        cells(again, recorded.STUDY, digests_of(params))
    for text, words in (
        ("{", "not readable as JSON"),
        (json.dumps({**config, "epoch": 1}), "unknown field 'epoch'.*epochs"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            recorded.read_recorded(file)
    with pytest.raises(InputError, match="gone.json: no such file"):
        recorded.read_recorded(tmp_path / "gone.json")


def test_todays_code_trains_an_old_trial_as_it_was(params, tmp_path: Path) -> None:
    digests = digests_of(params)
    (cell, *_) = (cell for cell in cells(params, "miniature-points", digests) if cell.row == "live-residual")
    config = cell.trial({}).model_dump(mode="json")
    (tmp_path / "old.json").write_text(
        json.dumps({**config, "options": {"magnitude_learning_rate": None}})  # of before there was a point
    )
    again = recorded.params_of(recorded.read_recorded(tmp_path / "old.json"), params)
    (cell,) = cells(again, recorded.STUDY, digests)
    trial = cell.trial({})
    assert "point" not in trial.options
    assert methods.options(trial).plain()["point"] == "residual"
