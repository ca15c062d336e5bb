from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.scores import vqa


def plain_accuracy(answer, references):
    """The definition, word for word: the mean over ten leave-one-out sets."""
    sets = [references[:i] + references[i + 1 :] for i in range(len(references))]
    return 100 * sum(min(1, others.count(answer) / 3) for others in sets) / len(sets)


def test_normalisation_is_the_official_one(golden):
    for pair in golden("vqa")["pairs"]:
        bare = vqa.strip_punctuation(pair["input"])
        assert bare == pair["after_punctuation"]
        assert vqa.normalise_words(bare) == pair["after_words"]


def test_official_accuracy_is_that_of_the_official_code(golden):
    expected = golden("vqa")
    score = vqa.vqa_accuracy(
        expected["predictions"], expected["answers"], "official", answer_types=expected["answer_types"]
    )
    assert score.overall == pytest.approx(expected["overall"], abs=0.006)
    assert score.per_question == pytest.approx(expected["per_question"], abs=0.006)
    assert score.per_answer_type == pytest.approx(expected["per_answer_type"], abs=0.006)
    assert score.num_questions == len(expected["predictions"])


def test_the_two_normalisations_differ_only_where_annotators_agree():
    references = {"agree": ["Two dogs."] * 10, "differ": ["Two dogs."] * 9 + ["cat"]}
    predictions = dict.fromkeys(references, "2 dogs")
    always = vqa.vqa_accuracy(predictions, references)
    official = vqa.vqa_accuracy(predictions, references, "official")
    assert always.per_question == {"agree": 100.0, "differ": 100.0}
    assert official.per_question == {"agree": 0.0, "differ": 100.0}


def test_an_empty_prediction_is_right_against_an_article():
    """Articles are dropped on both sides, by the official program too; docs/tasks.md says so."""
    references = {"articles": ["the"] * 4 + ["a"] * 3 + ["dog"] * 3, "all": ["a"] * 10}
    for nothing in ("", "the", " "):
        predictions = dict.fromkeys(references, nothing)
        assert vqa.vqa_accuracy(predictions, references).per_question == {"articles": 100.0, "all": 100.0}
        official = vqa.vqa_accuracy(predictions, references, "official")
        assert official.per_question == {"articles": 100.0, "all": 0.0}  # ten equal answers are compared as they are


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=10), st.sampled_from("abc"))
def test_closed_form_is_the_leave_one_out_mean(references, answer):
    # Letters that normalisation leaves alone, save the article.
    references = [letter.replace("a", "x") for letter in references]
    answer = answer.replace("a", "x")
    score = vqa.vqa_accuracy({1: answer}, {1: references})
    assert score.overall == pytest.approx(plain_accuracy(answer, references))


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    once = vqa.normalise_answer(text)
    assert vqa.normalise_answer(once) == once


@given(st.text(alphabet=".,'- aone13\n\t;?/", max_size=30))
def test_normalising_twice_changes_nothing_near_punctuation(text):
    once = vqa.normalise_answer(text)
    assert vqa.normalise_answer(once) == once


def test_ten_thousand_answers_are_quick():
    predictions = {key: f"a red car, number {key % 997}!" for key in range(10_000)}
    references = {key: [f"red car number {key % 991 + i}" for i in range(10)] for key in predictions}
    vqa.normalise_answer.cache_clear()
    before = time.process_time()
    vqa.vqa_accuracy(predictions, references)
    assert time.process_time() - before < 5


def test_a_question_without_annotation_is_named():
    with pytest.raises(InputError, match="without annotation.*8"):
        vqa.vqa_accuracy({7: "a", 8: "b"}, {7: ["a"]})


@pytest.mark.parametrize(("predictions", "normalise"), [({}, "always"), ({1: "a"}, "sometimes")])
def test_nothing_to_score_and_unknown_normalisation(predictions, normalise):
    with pytest.raises(InputError):
        vqa.vqa_accuracy(predictions, {1: ["a"]}, normalise)
