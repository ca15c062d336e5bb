"""MME: its official layouts in, pairs of questions out."""

from __future__ import annotations

import json

import pytest

from pipeline import tasks
from pipeline.core.errors import InputError
from pipeline.data.image_files import open_image
from pipeline.sweep.draw import draw_manifest
from tests.support.scoring import main
from tests.tasks.conftest import failure, make_mme_shards


def test_mme_reads_both_layouts_and_keeps_pairs_together(mme):
    task = tasks.get("mme")
    samples = list(task.read(mme, "evaluation"))
    assert len(samples) == 14 * 4 * 2 == len({sample.sample_id for sample in samples})
    assert samples[0].sample_id == "existence/0000.jpg#0"
    assert [sample.target for sample in samples[:2]] == ["Yes", "No"]
    assert samples[0].question == "Is it é0? Please answer yes or no."
    manifest = draw_manifest(task, mme, seed=0, num_train=20, num_selection=10)
    assert manifest.sizes == {"train": 20, "selection": 10, "evaluation": 82}
    for part in manifest.splits.values():
        names = {sample.images[0].path for sample in part}
        assert len(part) == 2 * len(names)
    assert draw_manifest(task, mme, seed=0, num_train=20, num_selection=10, num_evaluation=6).sizes["evaluation"] == 6
    with pytest.raises(InputError, match="no image may be in two splits"):
        draw_manifest(task, mme, seed=0, num_train=112, num_selection=0)


def test_mme_is_scored_by_accuracy_and_by_pairs(mme):
    task = tasks.get("mme")
    samples = list(task.read(mme, "evaluation"))
    right = {sample.sample_id: f"{sample.target.lower()}, it is" for sample in samples}
    perfect = task.score(samples, right)
    assert perfect.value == 100
    assert perfect.metrics == {"accuracy_plus": 100, "perception": 2000, "cognition": 800}
    always_yes = task.score(samples, dict.fromkeys(right, "Yes"))
    assert always_yes.value == 50
    assert always_yes.metrics == {"accuracy_plus": 0, "perception": 500, "cognition": 200}
    cut = task.score(samples[:3], right)  # the second image lost its second question
    assert (cut.value, cut.metrics["accuracy_plus"]) == (100, 100)


def test_mme_equals_the_command_on_its_result_files(mme, tmp_path, capsys):
    task = tasks.get("mme")
    samples = list(task.read(mme, "evaluation"))
    answers = ("Yes", "no", "No, it is not", "perhaps", "yes\tand", "not sure", "Yes.")
    predictions = {sample.sample_id: answers[number % 7] for number, sample in enumerate(samples)}
    lines: dict[str, list[str]] = {}
    for sample in samples:
        columns = (sample.meta["image"], sample.question, sample.target, predictions[sample.sample_id])
        lines.setdefault(sample.meta["category"], []).append("\t".join(map(str, columns)))
    (tmp_path / "results").mkdir()
    for subtask, rows in lines.items():
        (tmp_path / "results" / f"{subtask}.txt").write_text("\n".join(rows), encoding="utf-8")
    assert main(["mme", "--results", str(tmp_path / "results")]) == 0
    official, score = json.loads(capsys.readouterr().out), task.score(samples, predictions)
    assert score.details["per_category"] == official["accuracy"]
    assert score.details["accuracy_plus_per_category"] == official["accuracy_plus"]
    assert score.metrics["perception"] == official["Perception"]["total"]
    assert score.metrics["cognition"] == official["Cognition"]["total"]


def test_mme_from_shards_equals_mme_from_folders(mme, tmp_path_factory):
    task, root = tasks.get("mme"), make_mme_shards(tmp_path_factory.mktemp("shards"))
    folders = list(task.read(mme, "evaluation"))
    shards = list(task.read(root, "evaluation"))
    for one, other in zip(folders, shards, strict=True):
        assert (one.sample_id, one.question, one.target) == (other.sample_id, other.question, other.target)
        assert open_image(root / other.images[0].path).tobytes() == open_image(mme / one.images[0].path).tobytes()
    drawn = [
        [
            sample.sample_id
            for sample in draw_manifest(task, place, seed=2, num_train=20, num_selection=10).splits["train"]
        ]
        for place in (mme, root)
    ]
    assert drawn[0] == drawn[1]


def test_mme_errors_are_named(mme):
    text = mme / "mme" / "MME_Benchmark_release_version" / "OCR" / "0002.txt"
    text.write_text("One question\tYes\n")
    assert "OCR/0002.txt: has 1 lines" in failure(mme, "mme")
    text.write_text("One\tYes\nTwo\tPerhaps\n")
    assert "0002.txt: line 2: the answer is 'Perhaps'" in failure(mme, "mme")
    text.write_text("One\tYes\nTwo\tNo\n")
    text.with_suffix(".jpg").unlink()
    with pytest.raises(InputError, match=r"1 image is missing or cannot be read:\n .*OCR/0002\.jpg: .*does not exist"):
        draw_manifest(tasks.get("mme"), mme, seed=0, num_train=10, num_selection=0)
    for picture in text.parent.iterdir():
        picture.unlink()
    text.parent.rmdir()
    assert "'OCR' was not found" in failure(mme, "mme")
