"""Measures of trials: two studies keep theirs apart, and each is offered to MLflow until it has it."""

from __future__ import annotations

import json
from types import SimpleNamespace

from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import WorkError
from pipeline.core.files import file_digest
from pipeline.measure import Measured
from pipeline.pool import supervisor
from pipeline.records.evaluation import CellResult, Evaluation, Evaluations, LayerValues
from pipeline.records.trial import Provenance
from pipeline.sweep import evaluate as measures

LAYERS = LayerValues(by_layer={"time": (1.0, 2.0)}, by_token={"time": ((0.5, 0.5), (1.5, 0.5))})


def scored(row: str, evaluations: Evaluations) -> measures.ScoredCell:
    """A scored cell of a trial that is called like its row."""
    evaluation = EvaluationConfig(
        trial=row, num_samples=None, num_beams=1, length_penalty=1.0, max_new_tokens=5, vqa_normalise="always"
    )
    record = Evaluation(
        trial=row, config={}, evaluation=evaluation.model_dump(), metric="accuracy", unit="percent", value=50.0,
        metrics={"accuracy": 50.0}, num_samples=1, predictions=(),
    )  # fmt: skip
    evaluations.write(evaluation.key, record)
    cell = SimpleNamespace(name=f"{row}-cell", row=row, backbone="b", task="t", seed=0, vary={})
    result = CellResult(
        row=row, label=row, method=row, backbone="b", paper_backbone="b", task="t", paper_task="t", metric="accuracy",
        value=50.0, metrics={"accuracy": 50.0},
    )  # fmt: skip
    return measures.ScoredCell(cell, result, SimpleNamespace(key=row), evaluation)


def test_a_row_of_two_studies_keeps_both_numbers(tmp_path, monkeypatch):
    seconds = iter(range(1, 100))  # each time another time

    def measure_all(params, kind, groups, drivers):
        same = {"flops_per_sample": 2.0, "peak_bytes": 3.0}
        for number, jobs in enumerate(groups):
            yield number, [Measured({"milliseconds_per_sample": float(next(seconds)), **same}, LAYERS) for _ in jobs]

    monkeypatch.setattr(supervisor, "measure_all", measure_all)
    monkeypatch.setattr(measures, "data_root", lambda params: tmp_path)
    study = SimpleNamespace(measure="training_cost", measured={}, reference="hificl")
    params = SimpleNamespace(studies={"first": study, "second": study})
    logged: list[str] = []
    sync = SimpleNamespace(tracker=SimpleNamespace(provenance=Provenance()), measurement=logged.append)
    evaluations = Evaluations(tmp_path / "evaluations")
    hificl, mimic, lora = (scored(row, evaluations) for row in ("hificl", "mimic", "lora"))

    def run(name, *rows):
        return {result.row: result for result in measures.measured(params, name, rows, evaluations, sync, None)}

    first = run("first", hificl, mimic)
    second = run("second", hificl, lora)
    for found in (*first.values(), *second.values()):
        assert file_digest(tmp_path / found.measurement) == found.measurement_digest
        assert found.layers == LAYERS
        assert found.metric == "time" and found.metrics["accuracy"] == 50.0 and found.value == found.metrics["time"]
    assert first["hificl"].measurement != second["hificl"].measurement
    assert run("first", mimic, hificl) == first, "measured again, though nothing is new"
    keys = {path.stem for path in (tmp_path / "evaluations/measures").glob("*.json")}
    assert len(keys) == 4 and set(logged) == keys
    assert len(logged) == 6  # those of before too: MLflow may have been away
    assert json.loads((tmp_path / first["mimic"].measurement).read_text())["trial"] == "mimic"


def test_a_group_that_cannot_be_measured_has_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "measure_all", lambda *_: iter([(0, WorkError("no memory"))]))
    monkeypatch.setattr(measures, "data_root", lambda params: tmp_path)
    study = SimpleNamespace(measure="training_cost", measured={}, reference="hificl")
    evaluations = Evaluations(tmp_path / "evaluations")
    row = scored("hificl", evaluations)
    (found,) = measures.measured(SimpleNamespace(studies={"cost": study}), "cost", [row], evaluations, None, None)
    assert (found.status, found.error, found.value, found.metrics) == ("failed", "no memory", None, {})
