"""The published code's own choices: off by default, without a trace in any key, and turned on together."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import astuple, replace

import pytest

from benchmarks.support.synthetic import SyntheticSize, write_images, write_vqav2
from pipeline import backbones, methods
from pipeline.config.load import load
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate.generate import cut_at_stop
from pipeline.plan.space import Digests, cells
from pipeline.prompts.prompt import draw_demos, encode_all, render, stop_strings
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks import tasks
from pipeline.tasks.caption_files import CAPTION_TEMPLATE
from pipeline.tasks.vqa import VQA_TEMPLATE, VqaTask
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
    assert (off.subsample.prompt, off.subsample.splits, off.evaluate.stem_predictions) == ("papers", {}, False)
    assert (on.subsample.prompt, on.evaluate.stem_predictions) == ("published", True)
    assert on.subsample.splits == {"coco": "karpathy-val", "flickr30k": "karpathy-val"}
    generation = on.evaluate.generation
    assert {generation.num_beams, generation.length_penalty, generation.max_new_tokens} == {"published"}
    assert generation.batch_size == off.evaluate.generation.batch_size  # the profile's own
    assert params("protocol=published", "train.selection=selection").train.selection == "selection"
    with pytest.raises(InputError, match=r"unknown protocol 'publishd'.*Did you mean 'published'"):
        params("protocol=publishd")


def test_choices_that_are_off_leave_the_keys_as_they_were():
    """The keys that these configurations had before the fields existed."""
    assert TrialConfig(**BASE).key == "ba339abfe9bdc086"
    assert EvaluationConfig(trial="t").key == "4690cd6343357d16"
    assert TrialConfig(**BASE, demonstration_draw="with-replacement").key != TrialConfig(**BASE).key
    assert EvaluationConfig(trial="t", stem_predictions=True).key != EvaluationConfig(trial="t").key
    assert EvaluationConfig(trial="t", drop_incomplete_batch=16).key != EvaluationConfig(trial="t").key


def test_each_method_decodes_as_its_own_published_code():
    found = {name: methods.published_decoding(name) for name in methods.names()}
    greedy = {name for name, one in found.items() if one.num_beams == 1}
    assert greedy == {"hificl", "hificl+lora", "moe-hificl", "parallel-icl"}
    assert {found[name].max_new_tokens for name in greedy if "hificl" in name} == {20}
    others = {astuple(one) for name, one in found.items() if name not in greedy}
    assert others == {(3, 0.0, None)}  # MimIC's code; None: the task's own, 10, for captions 20
    assert tasks.get("vqav2").max_new_tokens == 10


def test_only_trials_with_a_teacher_have_its_draw():
    known = params("protocol=published")
    names = known.run.backbones, known.run.tasks
    digests = Digests(*({name: name for name in part} for part in names), dict.fromkeys(names[1], 1000))
    draws = {cell.row: cell.trial({}).demonstration_draw for cell in cells(known, "miniature-methods", digests)}
    assert draws["mimic"] == draws["hificl+teacher"] == draws["live"] == "with-replacement"
    assert draws["hificl"] == draws["icl-8"] == draws["lora-r16"] == "without-replacement"


def test_what_starts_from_demonstrations_is_shown_as_many_as_a_teacher_shows():
    known = params("protocol=published", "train.num_shots=5", "train.alignment_weight=0.3")
    names = known.run.backbones, known.run.tasks
    digests = Digests(*({name: name for name in part} for part in names), dict.fromkeys(names[1], 1000))
    trials = {cell.row: cell.trial({}) for cell in cells(known, "miniature-baselines", digests)}
    shown = {row for row, trial in trials.items() if trial.num_shots}
    assert shown == {"ct-kv", "i2cl", "m2iv", "hificl+logits"} and {trials[row].num_shots for row in shown} == {5}
    taught = {row for row, trial in trials.items() if trial.alignment_weight}
    assert taught == {"m2iv", "hificl+logits"}
    assert taught == {row for row, trial in trials.items() if trial.demonstration_draw == "with-replacement"}


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
        answer: draw_manifest(tasks.get("vqav2"), root, **sizes, training_answer=answer)
        for answer in ("most-frequent", "first")
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


PUBLISHED = {
    "idefics-9b": "Instruction: INSTR\nImage:<image> Question: Q1 Answer: A1\nImage:<image> Question: Q2 Answer:",
    "idefics2-8b-base": "Instruction: INSTR<E>\nImage:<image><E>\nQuestion: Q1<E>\nAnswer: A1<E>\n"
    "Image:<image><E>\nQuestion: Q2<E>\nAnswer:",
    "llava-interleave-7b": "<|im_start|>instruction\nINSTR<|im_end|>\n<|im_start|>image\n<image><|im_end|>\n"
    "<|im_start|>question\n\nQ1<|im_end|>\n<|im_start|>answer\n\nA1<|im_end|>\n<|im_start|>image\n<image><|im_end|>\n"
    "<|im_start|>question\n\nQ2<|im_end|>\n<|im_start|>answer\n\n",
}


def asked(number):
    return Sample("vqav2", number, (ImageRef("0.png"),), f"Q{number}", f"A{number}", (f"A{number}",) * 10)


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_of_the_published_code(name, tiny):
    loaded = tiny(name)
    instruction = "Provide an answer to the question. Use the image to answer."
    text = PUBLISHED[name].replace("INSTR", instruction).replace("<E>", "<end_of_outterance>")
    opened = render(VQA_TEMPLATE, loaded.backbone, asked(2), [asked(1)], style="published")
    assert opened.text == text.replace("<image>", loaded.backbone.image_text)
    closed = render(VQA_TEMPLATE, loaded.backbone, asked(2), [asked(1)], answer=True, style="published")
    open_prompt, whole = encode_all(loaded, [opened, closed], image_sizes=[[(56, 56)] * 2] * 2)
    start, end = whole.answer_span
    assert whole.input_ids[:start] == open_prompt.input_ids and end == len(whole)
    stops = stop_strings(VQA_TEMPLATE, loaded.backbone, "published")
    assert cut_at_stop(loaded.tokenizer.decode(whole.input_ids[start:end]), stops) == "A2"
    alone = render(CAPTION_TEMPLATE, loaded.backbone, replace(asked(1), question=None), style="published").text
    assert "caption" in alone.lower() and not {"instruction", "question"} & set(re.findall("[a-z]+", alone.lower()))


def test_choices_and_instructions_of_the_published_code():
    idefics = backbones.get("idefics-9b")
    meta = {"question": "How many?", "choices": ["one", "two"]}
    asks = replace(asked(1), question="How many?\nA. one\nB. two\nAnswer", meta=meta)
    shown = render(tasks.get("seed-bench").template, idefics, asks, style="published").text
    assert shown == "Image:<image> Question: How many? Choices: A. one B. two Answer with the letter. Answer:"
    shown = render(tasks.get("mme").template, idefics, asked(1), style="published").text
    assert shown.startswith(
        'Instruction: Provide an answer in "Yes" or "No" to the question. Use the image to answer.\n'
    )
    assert render(tasks.get("mme").template, idefics, asked(1)).text == "Image: <image> Question: Q1 Answer:"


def test_other_backbones_keep_the_papers_lines():
    known = {name for name in backbones.names() if backbones.get(name).published_roles is not None}
    assert known == set(PUBLISHED)
    mini = backbones.get("mini-idefics2")
    assert render(VQA_TEMPLATE, mini, asked(1), style="published") == render(VQA_TEMPLATE, mini, asked(1))


def test_predictions_are_stemmed_where_the_references_are():
    known = {name: task for name in tasks.names() if isinstance(task := tasks.get(name), VqaTask)}
    assert [name for name, task in known.items() if task.stemmed_references] == ["okvqa"]
    sample = Sample("okvqa", 1, (ImageRef("0.png"),), "What sport?", "race", ("race",) * 10)
    assert known["okvqa"].score([sample], {1: "racing"}).value == 0
    assert replace(known["okvqa"], stem_predictions=True).score([sample], {1: "Racing"}).value == 100
