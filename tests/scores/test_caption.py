from __future__ import annotations

import os

import pytest

from pipeline.core.errors import InputError
from pipeline.scores import caption, java
from pipeline.scores.java import find_java

QUICK = tuple(name for name in caption.METRICS if name != "METEOR")


@pytest.fixture(scope="module")
def pairs(golden):
    expected = golden("captions")
    return expected, expected["captions"], expected["references"]


def test_tokens_are_those_of_pycocoevalcap(pairs):
    expected, captions, references = pairs
    raw = [text for texts in references.values() for text in texts] + list(captions.values())
    wanted = [text for texts in expected["tokens"]["references"].values() for text in texts]
    wanted += [texts[0] for texts in expected["tokens"]["captions"].values()]
    assert java.tokenise(raw) == wanted


def test_metrics_are_those_of_pycocoevalcap(pairs):
    expected, captions, references = pairs
    score = caption.caption_scores(captions, references, QUICK)
    assert score.overall == pytest.approx({name: expected["overall"][name] for name in QUICK}, abs=1e-9)
    for key, numbers in score.per_image.items():
        assert numbers == pytest.approx({name: expected["per_image"][key][name] for name in QUICK}, abs=1e-9)


@pytest.mark.slow
def test_meteor_is_that_of_pycocoevalcap(pairs):
    expected, captions, references = pairs
    score = caption.caption_scores(captions, references, ("METEOR",))
    assert score.overall["METEOR"] == pytest.approx(expected["overall"]["METEOR"], abs=1e-9)


def test_the_same_references_give_the_same_number_and_start_java_for_new_texts_only(pairs, monkeypatch):
    _, captions, references = pairs
    whole = caption.caption_scores(captions, references, ("CIDEr",)).overall["CIDEr"]
    started = []
    run = java.run_java
    monkeypatch.setattr(
        java, "run_java", lambda arguments, text, **where: started.append(text) or run(arguments, text, **where)
    )
    assert caption.caption_scores(captions, references, ("CIDEr",)).overall["CIDEr"] == whole
    assert len(started) == 1  # the captions; not the references
    changed = {**captions, "1": "a dog never seen before"}
    started.clear()
    assert caption.caption_scores(changed, references, ("CIDEr",)).overall["CIDEr"] != whole
    assert started == ["\n".join(changed.values()) + "\n"]


def test_line_breaks_and_odd_letters_stay_in_their_caption():
    raw = ["one\u2028two", "three\rfour", "five\x0csix\x0bseven", "\ud800 dog", "", "  ", "eight"]
    assert java.tokenise(raw) == ["one two", "three four", "five six seven", "dog", "", "", "eight"]


ODD = ["a vitamin C.", "A dog", "a vitamin C.", "a dog", "no.", "5 dogs", "no.", "", "the u.s.", "He runs",
       "it's 5 p.m.", 'say "hi"', "café (two) 50% $3", "don't; can't: won't", "1,000 ... 3/4", "???", "a  b",
       "end J."]  # fmt: skip


def test_the_next_caption_counts_as_in_pycocoevalcap(monkeypatch):
    """Its tokenizer looks past the end of a line."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    for texts in (ODD, ODD[::-1]):
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(find_java().parent), prepend=os.pathsep)
            official = PTBTokenizer().tokenize({at: [{"caption": text}] for at, text in enumerate(texts)})
        assert java.tokenise(texts) == [official[at][0] for at in range(len(texts))]
    assert java.tokenise(ODD) != java.tokenise(ODD[::-1])[::-1]


def test_blank_captions_score_without_java(monkeypatch):
    monkeypatch.setattr(java, "run_java", None)
    assert java.tokenise(["", " "]) == ["", ""]


@pytest.mark.parametrize(
    ("captions", "references", "metrics", "says"),
    [
        ({}, {}, ("CIDEr",), "no caption to score"),
        ({1: "a dog"}, {2: ["a dog"]}, ("CIDEr",), "without reference caption.*1: 1"),
        ({1: "a dog"}, {1: ["a dog"]}, ("cider",), "unknown caption metric 'cider'.*CIDEr"),
        ({1: "a dog"}, {1: ["", "."]}, ("CIDEr",), "no reference caption holds a word"),
    ],
)
def test_bad_input(captions, references, metrics, says):
    with pytest.raises(InputError, match=says):
        caption.caption_scores(captions, references, metrics)


@pytest.mark.skipif(caption.spice_missing() is None, reason="SPICE's models are at hand")
def test_spice_without_its_models_says_so():
    with pytest.raises(InputError, match=r"stanford-corenlp-3\.6\.0-models\.jar"):
        caption.caption_scores({1: "a dog"}, {1: ["a dog"]}, ("SPICE",))
