"""What a reader of MLflow's page finds: how experiments open, what is written, inputs by use, answers with pictures."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.tracking import records as answers
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import FINISHED, MetricPoint, RunInput, TrialRunStart
from pipeline.tracking.registry import log_adapter
from tests.tracking.conftest import ask, open_both, points

KIND, NOTE = "mlflow.experimentKind", "mlflow.note.content"
SCORED = RunInput(
    name="vqa/evaluation", source="data/manifests/vqa/manifest.json", digest="e" * 64, context="evaluation",
    samples="40 of evaluation, first", rows=40,
)  # fmt: skip


def tags_of(tracker: Tracker, study: str) -> dict[str, str]:
    return MlflowClient(tracker.uri).get_experiment_by_name(study).tags


def test_an_experiment_opens_on_its_runs_and_has_the_studys_table_as_a_view(tracker: Tracker) -> None:
    tracker.prepare(["new"], {"new": "Table 1\n\nRows and tasks."})
    tags = tags_of(tracker, "new")
    assert tags[KIND] == "custom_model_development"
    view = json.loads(tags["mlflow.sharedViewState.table"])
    assert "tags.`table.row`" in view["selectedColumns"] and view["orderByKey"] == "tags.`table.row`"
    number = tracker.experiment("new")
    assert tags[NOTE].startswith(f"Table 1 ([as a table](#/experiments/{number}/runs?")
    assert tags[NOTE].endswith("\n\nRows and tasks.")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "custom_model_development"),
        ("no_inferred_type", "custom_model_development"),
        ("genai_development_inferred", "custom_model_development"),
        ("genai_development", "genai_development"),  # somebody's choice
    ],
)
@pytest.mark.parametrize("way", ["sweep", "ui"])
def test_an_older_experiment_is_brought_up(root: Path, way: str, before: str | None, after: str) -> None:
    old = Tracker(None, root)
    old.close(old.open_sweep("study", tags={"sweep_key": "s"}, description=""), FINISHED)
    client, number = MlflowClient(old.uri), old.experiment("study")
    for key in (KIND, "mlflow.sharedViewState.table"):
        client.delete_experiment_tag(number, key)
    if before:
        client.set_experiment_tag(number, KIND, before)
    other = client.create_experiment("somebody's own")
    now = Tracker(None, root)
    if way == "ui":
        now.bring_up()
    else:
        now.prepare(["study"])
    assert tags_of(now, "study")[KIND] == after
    assert "mlflow.sharedViewState.table" in tags_of(now, "study")
    assert client.get_experiment(other).tags == {}


def test_what_a_reader_has_written_stays(root: Path) -> None:
    def notes() -> list[str]:
        tracker = Tracker(None, root)
        tracker.prepare(["study"], {"study": f"of {time.monotonic_ns()}"})
        parent = tracker.open_sweep("study", tags={"sweep_key": "s"}, description=f"of {time.monotonic_ns()}")
        text = f"of {time.monotonic_ns()}"
        child = tracker.open_trial("study", parent, TrialRunStart(key="abc", name="n", description=text))
        tracker.close_all(FINISHED)
        found = [tracker.read_run(run).tags[NOTE] for run in (parent, child)]
        assert f"hificl reproduce {child}" in found[1] and f"runs/{parent}/artifacts/report" in found[1]
        return [tags_of(tracker, "study")[NOTE], *found]

    first, second = notes(), notes()
    assert all(one != other for one, other in zip(first, second, strict=True))  # what was written here follows
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("study")
    for run in client.search_runs([experiment.experiment_id]):
        client.set_tag(run.info.run_id, NOTE, "mine")
    client.set_experiment_tag(experiment.experiment_id, NOTE, "mine")
    with pytest.raises(AssertionError):  # no link any more
        notes()
    assert {run.data.tags[NOTE] for run in client.search_runs([experiment.experiment_id])} == {"mine"}
    assert client.get_experiment(experiment.experiment_id).tags[NOTE] == "mine"


def test_losses_by_step_are_logged_once_beside_the_epochs(tracker: Tracker, root: Path) -> None:
    _, child = open_both(tracker)
    curve = [MetricPoint("step/train_loss", step, 1 / step) for step in range(1, 1201)]
    tracker.log_metrics(child, [*points({"epoch": 1, "train_loss": 0.33499999940395355}), *curve[:700]])
    rows = [{"epoch": 1, "train_loss": 0.33499999940395355}, {"epoch": 2, "train_loss": 0.25}]
    Tracker(None, root).log_metrics(child, [*points(*rows), *curve])  # after a crash: nothing is remembered
    assert ask(root, "select count(*), count(distinct step) from metrics where key = 'step/train_loss'") == [
        (1200, 1200)
    ]
    assert ask(root, "select step, value from metrics where key = 'train_loss' order by step") == [
        (1, 0.335),
        (2, 0.25),
    ]
    assert ask(root, "select value from metrics where key = 'step/train_loss' and step = 3") == [(0.333333,)]


def test_a_score_that_an_older_version_logged_with_all_its_digits_is_the_same_score(
    tracker: Tracker, root: Path
) -> None:
    _, child = open_both(tracker)
    MlflowClient(tracker.uri).log_metric(child, "test_accuracy", 94.13333333333334, step=0)
    tracker.log_scores(child, {"test_accuracy": 94.13333333333334, "train_flops": 12345678901234.0})
    rows = ask(root, "select key, value from metrics order by key")
    assert rows == [("test_accuracy", 94.13333333333334), ("train_flops", 12345678901234.0)]


def test_a_run_of_before_is_completed_and_keeps_its_time(tracker: Tracker, root: Path) -> None:
    parent, child = open_both(tracker)
    tracker.close(child, FINISHED)
    client = MlflowClient(tracker.uri)
    client.delete_tag(child, "mlflow.hificl.layout")
    ended = client.get_run(child).info.end_time
    assert tracker.ended_trials("study", parent) == {}
    time.sleep(0.05)
    again = Tracker(None, root)
    more = [RunInput(name="vqa/selection", source="m.json", digest="d", context="selection", samples="", rows=8)]
    run = again.open_trial("study", parent, TrialRunStart(key="abc", name="n", inputs=more, description="said"))
    again.close(run, FINISHED)
    assert run == child and client.get_run(child).info.end_time == ended
    assert set(again.ended_trials("study", parent)) == {"abc"}
    contexts = [one.context for one in again.read_run(child).inputs]
    assert sorted(contexts) == ["selection", "train"] and "said" in again.read_run(child).tags[NOTE]


@pytest.fixture
def evaluation(root: Path) -> Path:
    """An evaluation of 40 answers; every picture is noise, which compresses worst, and the first is gone."""
    random = np.random.default_rng(0)
    (root / "data").mkdir()
    for number in range(1, 40):
        pixels = random.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"data/{number}.png")
    rows = [
        {"sample_id": number, "prediction": "long " * 500, "score": number / 3, "question": f"Which {number}?",
         "references": ["a", "b", "a"], "image": f"data/{number}.png"}
        for number in range(40)
    ]  # fmt: skip
    file = root / "0123.json"
    record = {"trial": "t", "config": {}, "evaluation": {}, "metric": "accuracy", "unit": "percent", "value": 50.0}
    file.write_text(json.dumps({**record, "metrics": {}, "num_samples": 40, "predictions": rows}))
    return file


def test_some_answers_are_a_table_with_pictures(
    tracker: Tracker, root: Path, evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, child = open_both(tracker)
    tracker.close(child, FINISHED)
    for _ in range(2):
        tracker.log_answers(child, evaluation, SCORED)
    record = tracker.read_run(child)
    assert record.tags["evaluations"] == "0123" and record.tags["mlflow.runType"] == "evaluation"
    assert json.loads(record.tags["mlflow.loggedArtifacts"]) == [{"path": "answers.json", "type": "table"}]
    assert [one.evaluations for one in tracker.runs_of({"abc"})["abc"]] == [{"0123"}]
    (scored,) = [one for one in record.inputs if one.context == "evaluation"]
    assert json.loads(scored.source)["uri"] == "data/manifests/vqa/manifest.json"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)  # where MLflow's reader of tables looks for runs
    frame = MlflowClient(tracker.uri).load_table(record.experiment_id, "answers.json", [child])
    assert len(frame) == answers.SAMPLES
    assert list(frame["question"])[:3] == ["Which 0?", "Which 2?", "Which 5?"] and frame["references"][0] == "a; b"
    assert frame["score"][1] == 0.666667 and len(frame["answer"][0]) == 600
    assert frame["image"][0] is None and frame["image"][1]["filepath"].endswith("01.webp")
    (folder,) = root.glob(f"mlartifacts/study/{child}/artifacts")
    files = [folder / "answers.json", *(folder / "table_images").rglob("*.webp")]
    assert len(files) == answers.SAMPLES and sum(file.stat().st_size for file in files) < 300_000
    with Image.open(files[1]) as picture:
        assert max(picture.size) == 128


def test_a_folder_that_was_moved_takes_its_files_along(root: Path, evaluation: Path, tmp_path_factory) -> None:
    old = Tracker(None, root)
    _, child = open_both(old)
    old.log_answers(child, evaluation, SCORED)
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    log_adapter(old, child, adapter)
    old.close_all(FINISHED)
    new = tmp_path_factory.mktemp("elsewhere") / "a moved #1 project"
    shutil.copytree(root, new)
    assert Tracker(None, new).read_artifact(child, "answers.json")  # a copy: the first one's files
    assert str(root) in ask(new, "select artifact_uri from runs")[0][0]
    shutil.rmtree(root / "mlartifacts")
    now = Tracker(None, new)
    assert "Which 2?" in (now.read_artifact(child, "answers.json") or "")
    model = now.read_run(child).tags["adapter_model_id"]
    place = MlflowClient(now.uri).get_logged_model(model).artifact_location
    for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
        places = [place for (place,) in ask(new, f"select {column} from {table}") if "/mlartifacts" in place]
        assert places and all(place.startswith((new / "mlartifacts").as_uri()) for place in places)
    assert place.startswith((new / "mlartifacts").as_uri())
    now.log_answers(child, evaluation, SCORED)
    assert (new / "mlartifacts/study" / child / "artifacts/answers.json").exists()
