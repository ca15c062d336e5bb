"""The published code's own choices: off by default, without a trace in any key, and turned on together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from pipeline import backbones
from pipeline.config import load
from pipeline.data.manifest import Manifest
from pipeline.data.prompt import draw_demos, render
from pipeline.data.sample import ImageRef, Sample
from pipeline.data.subsample import draw
from pipeline.data.synthetic import SyntheticSize, write_images, write_vqav2
from pipeline.errors import InputError
from pipeline.sweep.space import Digests, cells
from pipeline.tasks import tasks
from pipeline.tasks.vqa_files import VQA_TEMPLATE
from pipeline.trial import EvaluationConfig, TrialConfig
from tests.conftest import ROOT

BASE = {"backbone": "b", "backbone_digest": "0", "task": "t", "manifest_digest": "1", "method": "hificl"}


def params(*overrides):
    return load(ROOT / "params.yaml", list(overrides))


def test_the_protocol_turns_every_choice_on_and_its_absence_none():
    off, on = params(), params("protocol=published")
    assert off.subsample.training_answer == "most-frequent" and on.subsample.training_answer == "first"
    assert off.train.demonstration_draw == "without-replacement" and on.train.demonstration_draw == "with-replacement"
    assert (off.train.loss_span, off.train.selection) == ("answer", "selection")
    assert (on.train.loss_span, on.train.selection) == ("sequence", "test")
    assert off.evaluate.drop_incomplete_batch is None and on.evaluate.drop_incomplete_batch == 16
    generation = on.evaluate.generation
    assert (generation.num_beams, generation.length_penalty) == (3, 0.0)
    assert generation.batch_size == off.evaluate.generation.batch_size  # the profile's own
    assert params("protocol=published", "train.selection=selection").train.selection == "selection"
    with pytest.raises(InputError, match=r"unknown protocol 'publishd'.*Did you mean 'published'"):
        params("protocol=publishd")


def test_choices_that_are_off_leave_the_keys_as_they_were():
    """The keys that these configurations had before the fields existed."""
    assert TrialConfig(**BASE).key == "ba339abfe9bdc086"
    assert EvaluationConfig(trial="t").key == "4690cd6343357d16"
    assert TrialConfig(**BASE, demonstration_draw="with-replacement").key != TrialConfig(**BASE).key
    assert EvaluationConfig(trial="t", drop_incomplete_batch=16).key != EvaluationConfig(trial="t").key


def test_only_trials_with_a_teacher_have_its_draw():
    known = params("protocol=published")
    names = known.run.backbones, known.run.tasks
    digests = Digests(*({name: name for name in part} for part in names), dict.fromkeys(names[1], 1000))
    draws = {cell.row: cell.trial({}).demonstration_draw for cell in cells(known, "miniature-methods", digests)}
    assert draws["mimic"] == draws["hificl+teacher"] == draws["live"] == "with-replacement"
    assert draws["hificl"] == draws["icl-8"] == draws["lora-r16"] == "without-replacement"


def test_drawn_with_replacement_the_query_can_come_and_twice():
    pool = list(range(6))
    drawn = [draw_demos(pool, query, 8, 0, draw=epoch, replacement=True) for query in pool for epoch in range(50)]
    assert drawn == [draw_demos(pool, q, 8, 0, draw=epoch, replacement=True) for q in pool for epoch in range(50)]
    counts = Counter(i for demos in drawn for i in demos)
    assert all(abs(count - 400) < 80 for count in counts.values())  # standard deviation about 18
    assert any(query in demos for query, demos in zip([q for q in pool for _ in range(50)], drawn, strict=True))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("vqav2")
    for subset, first in (("train2014", 1), ("val2014", 1001)):
        write_vqav2(root, subset, SyntheticSize(num_questions=30, num_images=30), first_image=first)
        names = [f"images/{subset}/COCO_{subset}_{first + i:012d}.jpg" for i in range(30)]
        write_images(root, names, width=32, height=24)
    sizes = {"seed": 0, "num_train": 15, "num_selection": 5, "num_evaluation": 5}
    return {
        answer: draw(tasks.get("vqav2"), root, **sizes, training_answer=answer) for answer in ("most-frequent", "first")
    }


def test_the_first_annotators_answer_is_trained_and_the_most_frequent_shown(drawn, tmp_path):
    usual, first = drawn["most-frequent"].splits["train"], drawn["first"].splits["train"]
    changed = 0
    for one, other in zip(usual, first, strict=True):
        assert other.target == other.references[0] and other.shown == one.target == one.shown
        assert replace(other, target=one.target, demonstration=None) == one
        changed += other != one
    assert changed and drawn["first"].digest != drawn["most-frequent"].digest
    assert "demonstration" not in usual[0].to_json()
    drawn["first"].save(tmp_path / "manifest.json")
    again = Manifest.load(tmp_path / "manifest.json")
    assert again.digest == drawn["first"].digest and again.splits["train"] == first


def test_a_demonstration_shows_its_own_answer():
    sample = Sample(
        "vqav2", 1, (ImageRef("0.png"),), "Where?", "first", ("first", "often", "often"), demonstration="often"
    )
    text = render(VQA_TEMPLATE, backbones.get("idefics2-8b-base"), sample, [sample], answer=True).text
    assert text.endswith("Question: Where? Answer: often\nImage: <image> Question: Where? Answer: first\n")
