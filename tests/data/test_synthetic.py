"""The made-up files have VQAv2's shape, and the benchmark of the draw runs on them."""

from __future__ import annotations

import json

import pytest

from benchmarks import subsample
from benchmarks.support.synthetic import FULL_TRAIN, SyntheticSize, write_vqav2


def test_files_have_the_official_shape(tmp_path):
    questions, annotations = write_vqav2(tmp_path, "train2014", SyntheticSize(50, 7), first_image=11)
    asked, given = json.loads(questions.read_text()), json.loads(annotations.read_text())
    assert {"info", "license", "data_type", "data_subtype", "task_type", "questions"} == set(asked)
    assert {"info", "license", "data_type", "data_subtype", "annotations"} == set(given)
    ids = [question["question_id"] for question in asked["questions"]]
    assert len(set(ids)) == 50 and ids == [annotation["question_id"] for annotation in given["annotations"]]
    for question, annotation in zip(asked["questions"], given["annotations"], strict=True):
        assert question["question_id"] // 1000 == question["image_id"] == annotation["image_id"]
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
    with pytest.raises(ValueError, match="repeat question ids"):
        write_vqav2(tmp_path, "train2014", SyntheticSize(1001, 1))


def test_the_full_size_is_the_official_one():
    assert (FULL_TRAIN.num_questions, FULL_TRAIN.num_images) == (443_757, 82_783)


def test_the_benchmark_reports_its_contract():
    drawn = {"num_train": 30, "num_selection": 10, "num_evaluation": 20}
    result = subsample.run(train=SyntheticSize(6000, 3000), val=SyntheticSize(3000, 1500), drawn=drawn, repeats=1)
    assert {"seconds_443757", "peak_gib_443757"} <= set(result["ratios"])
    assert 0 < result["ratios"]["seconds_443757"] < 60
    assert 0 < result["ratios"]["peak_gib_443757"] < 3
    assert result["sizes"]["train_questions"] == 6000
    json.dumps(result)
