from __future__ import annotations

import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from pipeline.scores.caption import cider_d

texts = st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join)
images = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(images)
def test_equal_to_pycocoevalcap(pairs):
    captions, references = [caption for caption, _ in pairs], [texts for _, texts in pairs]
    assume(any(any(texts) for texts in references))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overall, each = Cider().compute_score(
            dict(enumerate(references)), {at: [text] for at, text in enumerate(captions)}
        )
    ours, ours_each = cider_d(captions, references)
    assert ours == pytest.approx(overall, abs=1e-9)
    assert ours_each == pytest.approx(list(each), abs=1e-9)


def test_one_image_scores_zero_and_subsets_score_differently():
    captions = ["a dog on grass", "a cat on a couch", "a bus in rain"]
    references = [["a dog on green grass"], ["a cat asleep on a couch"], ["the bus in rain"]]
    whole, each = cider_d(captions, references)
    assert cider_d(captions[:1], references[:1]) == (0.0, [0.0])
    assert whole == pytest.approx(sum(each) / 3)
    assert cider_d(captions[:2], references[:2])[1][0] != pytest.approx(each[0])
