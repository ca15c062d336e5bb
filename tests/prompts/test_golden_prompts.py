"""Every backbone's prompts of every task, against the committed ones; and what must hold for any prompt."""

from __future__ import annotations

import json

import pytest

from pipeline import backbones
from pipeline.tasks import tasks
from tests.support import golden_prompts as golden


@pytest.mark.parametrize("name", backbones.names())
def test_prompts_are_the_committed_ones(name, tiny):
    committed = json.loads(golden.path(name).read_text(encoding="utf-8"))
    found = golden.records(tiny(name))
    for task, expected in committed.items():  # one by one, so that a failure shows one prompt
        assert found[task]["stop"] == expected["stop"]
        for shots, entry in expected["shots"].items():
            assert found[task]["shots"][shots] == entry, (task, shots)
    assert found.keys() == committed.keys()


def test_every_task_has_golden_prompts():
    others = [name for name in tasks.names() if name not in golden.TASKS]
    assert set(golden.FOLDER.glob("*.json")) == {golden.path(name) for name in backbones.names()}
    for name in others:  # the miniature's tasks read the words of those that they stand for
        assert tasks.get(name).template == tasks.get(tasks.get(name).stands_for).template


@pytest.mark.parametrize("shots", golden.SHOTS)
@pytest.mark.parametrize("task", golden.TASKS)
@pytest.mark.parametrize("name", backbones.names())
def test_what_holds_for_every_prompt(name, task, shots, tiny):
    loaded = tiny(name)
    facts, tokenizer = loaded.backbone, loaded.tokenizer
    rendered, closed = golden.prompt(loaded, task, shots, answer=True)
    opened_text, opened = golden.prompt(loaded, task, shots, answer=False)
    # markers are tokens of their own, and none the unknown token
    for marker in {text for text in facts.special_tokens.values() if text in rendered.text}:
        assert tokenizer.convert_tokens_to_ids(marker) != tokenizer.unk_token_id or marker == tokenizer.unk_token
        assert len(tokenizer(marker, add_special_tokens=False).input_ids) == 1
    # as many images as samples show, each as many tokens
    images = (1 + shots) * golden.FORMS[task][2]
    assert rendered.text.count(facts.image_text) == len(rendered.images) == images
    number = closed.input_ids.count(loaded.image_token_id)
    assert number >= images and number % images == 0
    # the start token once, at the start
    bos = tokenizer.bos_token_id
    if bos is not None and closed.input_ids[0] == bos:
        assert closed.input_ids.count(bos) == 1
    # an open prompt ends at a word, and the answer is the rest of the closed one, to the token
    assert opened_text.text == opened_text.text.rstrip() and opened.answer_span is None
    start, end = closed.answer_span
    assert opened.input_ids == closed.input_ids[:start] and end == len(closed)
    terminator = facts.chat.terminator if facts.chat else "\n"
    answer = tokenizer.decode(closed.input_ids[start:end], skip_special_tokens=False)
    assert answer.endswith(terminator)
    assert answer.removesuffix(terminator).strip() == golden.sample(task, 0).target
