from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.scores import mme, mmmu_pro, seed_bench
from pipeline.scores.mme import MmeRow


@pytest.mark.parametrize(
    ("response", "read"),
    [
        ("Yes", "yes"), ("no.", "no"), ("not sure", "no"), ("nyes", "yes"), ("the answer is yes", "other"),
        ("unknown", "other"), ("", "other"), ("no yes", "no"), ("- NO", "no"),
    ],
)  # fmt: skip
def test_mme_reads_four_letters(response, read):
    assert mme.read_reply(response) == read


def test_mme_accuracy_plus_needs_both_questions():
    rows = [
        MmeRow("a.jpg", "Yes", "yes"), MmeRow("a.jpg", "No", "no"),
        MmeRow("b.jpg", "Yes", "yes it is"), MmeRow("b.jpg", "No", "yes"),
    ]  # fmt: skip
    score = mme.mme_scores({"OCR": rows, "code_reasoning": rows[:2]})
    assert score.tasks["OCR"].accuracy == 75
    assert score.tasks["OCR"].accuracy_plus == 50
    assert score.group("Perception") == mme.MmePoints({"OCR": 125}, 125)
    assert score.group("Cognition").total == 200


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"OCR": [MmeRow("a", "Yes", "yes")]}, "two questions"),
        ({"OCR": [MmeRow("a", "Yes", "yes"), MmeRow("b", "No", "no")]}, "two questions"),
        ({"OCR": [MmeRow("a", "Perhaps", "yes"), MmeRow("a", "No", "no")]}, "ground truth is 'Perhaps'"),
        ({"ocr": []}, "unknown subtask 'ocr'"),
        ({"OCR": []}, "no question"),
        ({}, "no subtask"),
    ],
)
def test_mme_bad_input(rows, says):
    with pytest.raises(InputError, match=says):
        mme.mme_scores(rows)


def test_seed_bench_counts_rows_and_names_dimensions_from_the_file():
    content = {"question_type": {"Scene Understanding": 1, "Visual Reasoning": 8}}
    rows = [
        {"question_id": "1", "answer": "A ", "question_type_id": 1},
        {"question_id": "v2", "answer": "B", "question_type_id": 8},
    ]
    known = seed_bench.questions(content, rows, "SEED-Bench.json")
    results = [{"question_id": 1, "prediction": "A"}, {"question_id": "v2", "prediction": "C"}]
    score = seed_bench.seed_bench_scores([*results, results[0]], known)
    assert (score.n, score.n_duplicates) == (3, 1)
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.per_dimension == {"Scene Understanding": 1.0, "Visual Reasoning": 0.0}


def test_seed_bench_bad_input():
    with pytest.raises(InputError, match="gt_answer.*--questions"):
        seed_bench.seed_bench_scores([{"question_id": "1", "prediction": "A"}])
    with pytest.raises(InputError, match="unknown questions.*1: 1"):
        seed_bench.seed_bench_scores([{"question_id": "1", "prediction": "A"}], {})
    with pytest.raises(InputError, match="no result"):
        seed_bench.seed_bench_scores([])


def test_mmmu_pro_reads_letters_as_the_official_script(golden):
    expected = golden("mmmu_pro")
    for reply in expected["replies"]:
        assert mmmu_pro.read_letter(reply["response"], expected["options"]) == reply["letter"], reply


@given(st.text(), st.lists(st.text(), min_size=1, max_size=12))
def test_mmmu_pro_takes_any_text(response, options):
    letter = mmmu_pro.read_letter(response, options)
    assert letter is None or letter in "ABCDEFGHIJKL"[: len(options)]


def test_mmmu_pro_seed_decides_unreadable_replies_only():
    rows = [{"id": str(at), "options": "['x1', 'x2', 'x3', 'x4']", "answer": "A", "response": "?"} for at in range(20)]
    rows.append({"id": "read", "options": ["x1", "x2"], "answer": "B", "response": "Answer: B"})
    rows.append({"id": "error", "options": "['x1']", "answer": "A", "response": {"error": "timeout"}})
    score = mmmu_pro.mmmu_pro_scores(rows, seed=1)
    again = mmmu_pro.mmmu_pro_scores(rows, seed=1)
    other = mmmu_pro.mmmu_pro_scores(rows, seed=2)
    assert score == again
    assert [row.pred for row in score.rows] != [row.pred for row in other.rows]
    assert score.n_random_fallback == 21
    assert score.accuracy_deterministic == 1.0
    assert score.accuracy == pytest.approx(sum(row.if_right for row in score.rows) / 22)


@pytest.mark.parametrize("options", ["[", "__import__('os')", "'text'", "[]", None, 3, "(" * 5000])
def test_mmmu_pro_options_are_a_literal_list(options):
    with pytest.raises(InputError, match="options"):
        mmmu_pro.mmmu_pro_scores([{"id": "1", "options": options, "answer": "A", "response": "A"}])
