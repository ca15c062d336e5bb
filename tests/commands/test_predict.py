"""A question that the miniature's world was never asked is noted; a real task may be asked anything."""

from __future__ import annotations

import pytest

from pipeline.commands.predict import Predicted, _unheard
from pipeline.data.manifest import Manifest
from pipeline.data.sample import ImageRef, Sample
from pipeline.miniature.lexicon import QUESTIONS
from pipeline.tasks import tasks

ASKED = QUESTIONS[:8]


@pytest.fixture
def manifests(tmp_path):
    for task in ("mini-vqa", "vqav2", "mini-coco"):
        questions = [None] if task == "mini-coco" else ASKED
        samples = tuple(
            Sample(task, number, (ImageRef(f"{number}.png", "0" * 64),), question, "a", ("a",) * 10)
            for number, question in enumerate(questions)
        )
        splits = {"train": samples, "selection": (), "evaluation": ()}
        Manifest(task, 0, (), splits, tmp_path).save(tmp_path / task / "manifest.json")
    return tmp_path


def test_a_question_of_the_world_is_none_to_note(manifests):
    assert [_unheard(tasks.get("mini-vqa"), question, manifests) for question in ASKED] == [None] * 8


@pytest.mark.parametrize("question", ["What color is the circle?", "which colour?", "Which  colour?"])
def test_another_is_noted_with_those_that_there_are(manifests, question):
    note = _unheard(tasks.get("mini-vqa"), question, manifests)
    assert question in note and all(asked in note for asked in ASKED)
    said = {"answer": "redun", "method": "hificl", "backbone": "mini-idefics2", "task": "mini-vqa", "trial": "ab"}
    assert list(Predicted({**said, "note": note}).shown())[-1] == f"note: {note}"


def test_a_real_task_a_caption_and_a_folder_without_data_are_left_alone(manifests, tmp_path):
    assert _unheard(tasks.get("vqav2"), "What color is the circle?", manifests) is None
    assert _unheard(tasks.get("mini-coco"), None, manifests) is None
    assert _unheard(tasks.get("mini-vqa"), "What color is the circle?", tmp_path / "nowhere") is None
