"""Two studies measure one trial beside different rows: neither changes what the other has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from pipeline.digests import file_digest
from pipeline.sweep import answers, measures
from pipeline.trial import EvaluationConfig


def scored(row: str, folder: Path):
    """A scored cell of a trial that is called like its row."""
    evaluation = EvaluationConfig(
        trial=row, num_samples=None, num_beams=1, length_penalty=1.0, max_new_tokens=5, vqa_normalise="always"
    )
    (folder / f"{evaluation.key}.json").write_text("{}")
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
    tracker = SimpleNamespace(provenance={"machine": {}}, log_evaluation=None)
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
