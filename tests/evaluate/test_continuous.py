"""Continuous batching: what shares a batch, and when it joins it, changes no answer."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pipeline import adapters
from pipeline.core.errors import InputError, WorkError
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate.continuous import End, Engine, Member, Question, certain
from pipeline.evaluate.generate import generate
from pipeline.prompts.prompt import encode_all, render
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks.vqa import VQA_TEMPLATE

METHODS = ("hificl", "mimic", "live", "lora-mini", "lora", "hificl")


def trained(method, loaded, seed):
    """An adapter whose parameters are far from where they start."""
    adapter = adapters.create(method, loaded.model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return adapter


def member_of(loaded, adapter):
    def alone(prompt, most, stops=("\n",)):
        with adapters.attach(loaded.model, adapter):
            return generate(
                loaded, [prompt], max_new_tokens=most, visual_tokens=VisualTokens(loaded), stop_strings=stops,
                from_pixels=adapter.trains_vision,
            )[0]  # fmt: skip

    return Member(adapter, alone)


def prompts_of(loaded, pictures, number):
    made = []
    for i in range(number):
        images = (ImageRef(str(pictures / f"{i % 7}.png")),) if loaded.backbone.image_text else ()
        sample = Sample("vqav2", i, images, "What color is the " + "big " * (i % 4) + "dog?", "", ())
        made += encode_all(loaded, [render(VQA_TEMPLATE, loaded.backbone, sample)])
    return made


class Heard:
    """What a question's answer came to."""

    def __init__(self):
        self.parts, self.end, self.done = [], None, threading.Event()

    def __call__(self, text: str, end: End | None) -> None:
        self.parts.append(text)
        if end:
            self.end = end
            self.done.set()

    def text(self) -> str:
        assert self.done.wait(120)
        return self.parts[-1]


@pytest.fixture
def engine_of():
    started = []

    def start(loaded, **sizes):
        engine = Engine(loaded, **sizes)
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.mark.parametrize("backbone", ["mini-idefics2", "llava-interleave-7b", "qwen3-vl-8b"])
def test_answers_are_those_of_each_question_alone(tiny, backbone, pictures, engine_of):
    loaded = tiny(backbone)
    members = [member_of(loaded, trained(method, loaded, seed)) for seed, method in enumerate(METHODS)]
    prompts = prompts_of(loaded, pictures, 10)
    expected = [members[i % len(members)].alone(prompt, 3 + i % 6) for i, prompt in enumerate(prompts)]
    assert len(set(expected)) > 3

    engine = engine_of(loaded, most_rows=5)
    for member in members:
        engine.add(lambda member=member: member)
    heard = [Heard() for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.ask(Question(members[i % len(members)], prompt, 3 + i % 6, ("\n",), heard[i]))
        if i == 7:
            heard[2].text()  # the rest comes later, into places that others have left
    assert [each.text() for each in heard] == expected
    for each in heard:  # what was told before the end stayed
        assert [part for part in each.parts if not each.text().startswith(part)] == []
        assert each.end.reason in ("stop", "length") and each.end.tokens > 0
    assert engine.in_flight == engine.waiting == 0
    if engine.joins:  # rows shared passes
        assert engine.answered_alone == 0 and engine.passes < sum(each.end.tokens for each in heard)
    else:
        assert engine.answered_alone == len(prompts)
    engine.stop()
    assert members[0].alone(prompts[0], 3) == expected[0]  # nothing is attached


def test_a_token_that_is_not_certain_is_chosen_where_the_question_is_alone(tiny, pictures, engine_of):
    loaded = tiny("mini-idefics2")
    member = member_of(loaded, trained("hificl", loaded, 0))
    engine = engine_of(loaded, unsure=1e9)
    engine.add(lambda: member)
    (prompt,), heard = prompts_of(loaded, pictures, 1), Heard()
    expected = member.alone(prompt, 5)
    engine.ask(Question(member, prompt, 5, ("\n",), heard))
    assert heard.text() == expected and engine.answered_alone == 1


def test_adapters_come_and_go_between_two_tokens(tiny, pictures, engine_of):
    loaded = tiny("mini-idefics2")
    first, second = (member_of(loaded, trained(method, loaded, 3)) for method in ("hificl", "live"))
    prompts = prompts_of(loaded, pictures, 2)
    expected = [member.alone(prompt, 40, ()) for member, prompt in zip((first, second), prompts, strict=True)]
    engine = engine_of(loaded)
    engine.add(lambda: first)
    heard = Heard(), Heard()
    engine.ask(Question(first, prompts[0], 40, (), heard[0]))
    while not heard[0].parts:
        time.sleep(0.001)
    engine.add(lambda: second)
    engine.ask(Question(second, prompts[1], 40, (), heard[1]))
    engine.remove(first)
    assert [each.text() for each in heard] == expected
    with pytest.raises(InputError, match="no such file"):
        engine.add(lambda: member_of(loaded, adapters.load(pictures, loaded.model)))


def test_a_row_that_fails_takes_no_other_with_it(tiny, pictures, engine_of, capsys):
    loaded = tiny("mini-idefics2")
    member = member_of(loaded, trained("hificl", loaded, 0))
    good, bad = prompts_of(loaded, pictures, 2)
    expected = member.alone(good, 4)
    engine = engine_of(loaded)
    engine.add(lambda: member)
    bad = type(bad)(bad.input_ids, (ImageRef(str(pictures / "gone.png")),), bad.query_start, None, 1)
    heard = Heard(), Heard()
    for prompt, each in zip((good, bad), heard, strict=True):
        engine.ask(Question(member, prompt, 4, ("\n",), each))
    assert heard[0].text() == expected
    assert heard[1].text() == "" and heard[1].end.reason == "error"
    assert "gone.png" in capsys.readouterr().err


def test_too_many_are_refused_and_what_is_in_flight_is_answered_at_the_end(tiny, pictures, engine_of):
    loaded = tiny("mini-idefics2")
    member = member_of(loaded, trained("hificl", loaded, 0))
    engine = Engine(loaded, most_waiting=2)
    (prompt,), heard = prompts_of(loaded, pictures, 1), [Heard() for _ in range(3)]
    for each in heard[:2]:
        engine.ask(Question(member, prompt, 4, (), each))
    with pytest.raises(WorkError, match="too many questions wait"):
        engine.ask(Question(member, prompt, 4, (), heard[2]))
    engine.start()
    engine.stop()
    assert heard[0].text() == heard[1].text() == member.alone(prompt, 4, ())
    with pytest.raises(WorkError, match="the server ends"):
        engine.ask(Question(member, prompt, 4, (), heard[2]))


def test_what_may_yet_begin_a_stop_is_held_back():
    stops = ("\n", "Question:", "Qux")
    for text, shown in (
        (" a red", "a red"), ("red ", "red"), ("red Qu", "red"), ("red Question", "red"), ("red\ufffd", "red"),
        ("Quick", "Quick"), ("", ""),
    ):  # fmt: skip
        assert certain(text, stops) == shown
