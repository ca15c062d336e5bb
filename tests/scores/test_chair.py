from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.scores import chair
from pipeline.scores.singular import singular


def test_singular_makes_patterns_mistakes(golden):
    for word, one in golden("singular")["pairs"].items():
        assert singular(word) == one, word


@given(st.text(max_size=20))
def test_singular_takes_any_text(word):
    assert isinstance(singular(word), str)


@pytest.mark.parametrize(
    ("caption", "words", "nodes"),
    [
        ("A bus passes two buses.", ["bus"], ["bus"]),
        ("Two wine glasses beside a glass", ["wine glass"], ["wine glass"]),
        ("A baby elephant. an adult bird", ["elephant", "bird"], ["elephant", "bird"]),
        ("A passenger jet and its passengers", ["jet", "passenger"], ["airplane", "person"]),
        ("The seat of the toilet", ["toilet"], ["toilet"]),
        ("A toilet seat and a dog. A hot dog", ["toilet", "dog", "hot dog"], ["toilet", "dog", "hot dog"]),
        ("On the train tracks", [], []),
        ("Nothing here", [], []),
        ("", [], []),
    ],
)
def test_objects_of_a_caption(caption, words, nodes):
    found = chair.caption_objects(caption)
    assert (found.words, found.nodes) == (words, nodes)
    assert len(found.indices) == len(words)


@given(st.text())
def test_any_text_is_a_caption(text):
    found = chair.caption_objects(text)
    assert len(found.words) == len(found.nodes) == len(found.indices)


def test_eighty_categories():
    assert len(set(chair.synonyms().values())) == 80


def test_counts_every_mention_and_names_the_variant():
    score = chair.chair_scores(
        {1: "A dog, a dog and a cat", 2: "A man on a bench", 3: "nothing"},
        {1: {"cat", "bird"}, 2: {"person", "bench"}, 3: set(), 4: {"dog"}},
    )
    assert score.CHAIRs == pytest.approx(1 / 3)
    assert score.CHAIRi == pytest.approx(2 / 5)
    assert score.recall == pytest.approx(3 / 4)
    assert score.n_captions == 3
    assert score.sentences[0].mscoco_hallucinated_words == [["dog", "dog"], ["dog", "dog"]]
    assert "original" in score.as_dict()["variant"]


def test_ground_truth_unites_instances_and_reference_captions():
    truth = chair.ground_truth({1: ["dog"], 2: []}, {1: ["a man with a puppy"], 2: ["a sofa", "a couch"]})
    assert truth == {1: {"dog", "person"}, 2: {"couch"}}


def test_bad_input():
    with pytest.raises(InputError, match="without ground-truth objects.*1: 9"):
        chair.chair_scores({9: "a dog"}, {1: {"dog"}})
    with pytest.raises(InputError, match="no caption"):
        chair.chair_scores({}, {})
    with pytest.raises(InputError, match="unknown object 'dgo'.*Did you mean 'dog'"):
        chair.ground_truth({1: ["dgo"]}, {})


@given(
    st.lists(st.sampled_from(("a", "dog", "dogs", "etc", "mr", "cannot", "gonna", "bus", "", "hot", "i", "no", "st")))
)
def test_plain_captions_are_read_as_nltk_reads_them(words):
    sentences, words_of = chair._tokenisers()
    for end in ("", ".", " .", ". "):
        text = " ".join(words) + end
        slow = [word for sentence in sentences.tokenize(text) for word in words_of.tokenize(sentence)]
        assert chair._singulars(text) == tuple(map(singular, slow)), text
