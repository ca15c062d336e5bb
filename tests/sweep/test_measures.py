"""Measures of trials: two studies keep theirs apart, and a tracking server that is away gets its own later."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from pipeline.digests import file_digest
from pipeline.sweep import answers, measures
from pipeline.tracking.runs import Tracker
from pipeline.tracking.spool import SpooledTracker
from pipeline.trial import EvaluationConfig
from tests.support.free_port import free_port


def scored(row: str, folder: Path, **known: str):
    """A scored cell of a trial that is called like its row."""
    evaluation = EvaluationConfig(
        trial=row, num_samples=None, num_beams=1, length_penalty=1.0, max_new_tokens=5, vqa_normalise="always"
    )
    (folder / f"{evaluation.key}.json").write_text(json.dumps(known))
    cell = SimpleNamespace(name=f"{row}-cell", row=row, backbone="b", task="t", seed=0, vary={})
    return cell, SimpleNamespace(key=row), evaluation


def test_a_row_of_two_studies_keeps_both_numbers(tmp_path, monkeypatch):
    seconds = iter(range(1, 100))  # each time another time

    def measure_all(params, kind, groups):
        same = {"flops_per_sample": 2.0, "peak_bytes": 3.0}
        for number, jobs in enumerate(groups):
            yield number, [{"milliseconds_per_sample": float(next(seconds)), **same} for _ in jobs]

    monkeypatch.setattr(answers, "measure_all", measure_all)
    monkeypatch.setattr(measures, "data_root", lambda params: tmp_path)
    study = SimpleNamespace(measure="training_cost", measured={}, reference="hificl")
    params = SimpleNamespace(studies={"first": study, "second": study})
    tracker = SpooledTracker(Tracker(f"sqlite:///{tmp_path}/mlflow.db", tmp_path), tmp_path / ".spool")
    hificl, mimic, lora = (scored(row, tmp_path) for row in ("hificl", "mimic", "lora"))

    def run(name, *rows):
        return measures.measured(params, name, rows, tmp_path, tracker)

    first = run("first", hificl, mimic)
    second = run("second", hificl, lora)
    for found in (*first.values(), *second.values()):
        assert file_digest(tmp_path.parent / found["measurement"]) == found["measurement_digest"]
    assert first["hificl-cell"]["measurement"] != second["hificl-cell"]["measurement"]
    assert run("first", mimic, hificl) == first, "measured again, though nothing is new"
    assert len(list((tmp_path / measures.FOLDER).glob("*.json"))) == 4
    assert json.loads((tmp_path.parent / first["mimic-cell"]["measurement"]).read_text())["trial"] == "mimic"


def test_a_measure_waits_in_the_spool_while_the_store_is_away(tmp_path, monkeypatch):
    numbers = {"milliseconds_per_sample": 1.0, "flops_per_sample": 2.0, "peak_bytes": 3.0}
    monkeypatch.setattr(answers, "measure_all", lambda params, kind, groups: iter([(0, [numbers])]))
    monkeypatch.setattr(measures, "data_root", lambda params: tmp_path)
    params = SimpleNamespace(
        studies={"cost": SimpleNamespace(measure="training_cost", measured={}, reference="hificl")}
    )
    uri = f"http://127.0.0.1:{free_port()}"
    away = SpooledTracker(Tracker(uri, tmp_path), tmp_path / ".spool")
    found = measures.measured(params, "cost", [scored("hificl", tmp_path, run_id="r")], tmp_path, away)
    assert found["hificl-cell"]["metrics"].items() >= numbers.items()
    (kept,) = SpooledTracker(Tracker(uri, tmp_path), tmp_path / ".spool").file.entries
    file = str(tmp_path.parent / found["hificl-cell"]["measurement"])
    assert kept == {"do": "log_evaluation", "run": "r", "with": {"metrics": numbers, "file": file}}
