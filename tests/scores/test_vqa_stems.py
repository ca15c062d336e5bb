"""Stems of answers: the forms that OK-VQA's annotations hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scores.vqa import stem_answer

PAIRS = """racing:race riding:ride skateboarding:skateboard running:run eating:eat sitting:sit baking:bake flying:fly
skiing:ski fishing:fish celebrating:celebrate hiking:hike cutting:cut boating:boat juggling:juggle cycling:cycle
rolling:roll hanging:hang changing:change exercising:exercise visiting:visit rowing:row fixing:fix seeing:see
quitting:quit competing:compete string:string thing:thing morning:morning building:building dogs:dog buses:bus bus:bus
glasses:glass glass:glass tennis:tennis cactus:cactus babies:baby ties:tie movies:movie leaves:leaf knives:knife
olives:olive gloves:glove beaches:beach tomatoes:tomato shoes:shoe horses:horse men:man yes:yes feet:foot 1990s:1990s
bleeding:bleed ring:ring gas:gas""".split()  # noqa: SIM905


@pytest.mark.parametrize("pair", PAIRS)
def test_stems(pair):
    word, stem = pair.split(":")
    assert stem_answer(word) == stem == stem_answer(stem)


def test_only_what_changes_loses_its_capitals():
    assert stem_answer("Pony tail") == "Pony tail"
    assert stem_answer("Horseback riding  in Texas") == "Horseback ride in Texas"
    assert stem_answer("") == ""


@given(st.text())
def test_any_text_has_a_stem(text):
    assert len(stem_answer(text).split()) == len(text.split())
