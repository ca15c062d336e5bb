"""What the record of a final evaluation holds beside the score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import adapters, tasks
from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest
from pipeline.miniature.world import object_synonyms
from pipeline.records.evaluation import Evaluation
from pipeline.scores import chair
from pipeline.train.workbench import Workbench
from tests.support.scoring import main


@pytest.fixture(scope="module")
def captions(small_world):
    """Evaluation samples of mini-coco, and a caption each: right, right and wrong, wrong twice, nothing named."""
    samples = Manifest.load(small_world / "mini-coco" / "manifest.json").splits["evaluation"]
    words = chair.categories_of([small_world / "data" / "annotations" / "instances_val2014.json"])
    named, dialects = chair.synonyms(chair.MINIATURE_WORDS), object_synonyms()
    there = [words[str(sample.sample_id)] for sample in samples]
    shown = [dialects[names[0]][0] for names in there]
    absent = []
    for sample, names in zip(samples, there, strict=True):
        known = chair.ground_truth({0: names}, {0: sample.references}, named)[0]
        absent.append(next(synonyms[0] for name, synonyms in dialects.items() if name not in known))
    texts = (shown[0], f"{shown[1]} and {absent[1]}", f"{absent[2]} {absent[2]}", "nothing")
    return samples, {sample.sample_id: text for sample, text in zip(samples, texts, strict=True)}, absent


def test_a_caption_evaluation_has_chair(small_world, captions):
    samples, predictions, absent = captions
    task = tasks.get("mini-coco")
    plain = task.score(samples, predictions)
    score = task.complete(plain, samples, predictions, small_world / "data", "evaluation")
    assert (plain.metrics, plain.wrong_words, score.value) == ({}, {}, plain.value)
    assert score.metrics["CHAIRs"] == 2 / 4
    assert score.metrics["CHAIRi"] == 3 / 5
    assert 0 < score.metrics["recall"] < 1
    assert list(score.wrong_words.values()) == [[], [absent[1]], [absent[2]] * 2, []]
    assert score.details["chair"]["variant"] == chair.VARIANT
    assert list(score.details["chair"]["objects"]) == ["annotations/instances_val2014.json"]


def test_without_annotated_objects_chair_is_left_out_and_named(captions, tmp_path):
    samples, predictions, _ = captions
    task = tasks.get("mini-coco")
    score = task.score(samples, predictions)
    absent = task.complete(score, samples, predictions, tmp_path, "evaluation")
    assert absent.metrics == {} and absent.value == score.value
    assert "mini-coco: no CHAIR: 'instances_val2014.json' was not found" in absent.details["left_out"][0]
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_val2014.json"
    for content, says in (("{", "not valid JSON"), ('{"categories": []}', "has no 'images'")):
        file.write_text(content)
        (line,) = task.complete(score, samples, predictions, tmp_path, "evaluation").details["left_out"]
        assert says in line
    file.write_text(json.dumps({"categories": [], "images": [{"id": samples[0].sample_id}], "annotations": []}))
    (line,) = task.complete(score, samples, predictions, tmp_path, "evaluation").details["left_out"]
    assert f"images without an entry (3: {samples[1].sample_id}, " in line


def test_the_evaluation_record_carries_chair(small_world, trial, tmp_path):
    request = trial("zero-shot", tmp_path, task="mini-coco")
    evaluation = EvaluationConfig(trial=request.config.key, max_new_tokens=8)
    record = Workbench(device="cpu").score(request, evaluation)
    assert list(record.metrics) == ["CIDEr", "CHAIRs", "CHAIRi", "recall"]
    assert record.metrics["CIDEr"] == record.value
    assert all(0 <= record.metrics[name] <= 1 for name in ("CHAIRs", "CHAIRi", "recall"))
    assert all(set(row.hallucinated) <= set(row.prediction.lower().split()) for row in record.predictions)
    assert not record.left_out
    assert Evaluation.parse(record.text(), "file", "") == record


def test_an_adapter_of_one_task_answers_the_questions_of_another(trial, tmp_path):
    bench = Workbench(device="cpu")
    captions = trial("zero-shot", tmp_path, task="mini-coco")
    request = trial("lora", tmp_path, rank=2)  # of mini-vqa; its second factor is zero, so that it changes nothing
    adapter = adapters.create("lora", bench.resident(request).loaded.model, **request.config.options)
    adapter.save_pretrained(Path(request.folder) / "adapter")
    digest = captions.config.manifest_digest
    asked = EvaluationConfig(trial=request.key, task="mini-coco", manifest_digest=digest, max_new_tokens=8)
    on_target = replace(request, manifest=captions.manifest, manifest_digest=digest)
    record = bench.score(on_target, asked)
    base = bench.score(captions, EvaluationConfig(trial=captions.key, max_new_tokens=8))
    assert (record.trial, record.config["task"], record.metric) == (request.key, "mini-vqa", "CIDEr")
    assert record.predictions == base.predictions and record.value == base.value
    assert (record.logged_as("CIDEr"), base.logged_as("CIDEr")) == ("test_mini-coco_CIDEr", "test_CIDEr")
    with pytest.raises(InputError, match="the data changed"):
        bench.score(replace(on_target, manifest_digest=None), asked)


def test_the_miniatures_objects_are_named_as_its_lexicon_names_them():
    expected = {word: root for root, words in object_synonyms().items() for word in (root, *words)}
    assert chair.synonyms(chair.MINIATURE_WORDS) == expected
    found = chair.caption_objects("A circak, two BARUN and a dog", expected)
    assert found.nodes == ["circ", "bar"]


def test_a_replaced_instances_file_is_read_again(tmp_path, capsys):
    path = tmp_path / "instances.json"
    content = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 5, "name": "dog"}], "annotations": []}
    path.write_text(json.dumps(content))
    assert chair.categories_of([path]) == {"1": [], "2": []}
    content["annotations"] = [{"image_id": 1, "category_id": 5}] * 2
    path.write_text(json.dumps(content))
    assert chair.categories_of([path, path]) == {"1": ["dog", "dog"], "2": []}
    assert main(["chair", "--results", str(path), "--objects", str(tmp_path / "none.json")]) == 2
    assert "error" in capsys.readouterr().err
