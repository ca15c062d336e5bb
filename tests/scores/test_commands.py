from __future__ import annotations

import copy
import json
import statistics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.scoring import main

QUESTIONS = {"questions": [{"question_id": 1, "image_id": 1, "question": "?"}, {"question_id": 2, "image_id": 1}]}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 1, "answer_type": "other", "question_type": "what", "answers": [{"answer": "a dog"}] * 10},
        {"question_id": 2, "answer_type": "number", "question_type": "how", "answers": [{"answer": "two"}] * 10},
    ]
}
ANSWERS = [{"question_id": 1, "answer": "dog"}, {"question_id": 2, "answer": "3"}]
CAPTIONS = {"images": [{"id": 7}], "annotations": [{"image_id": 7, "id": 1, "caption": "A man on a sofa"}]}
INSTANCES = {
    "images": [{"id": 7}],
    "categories": [{"id": 18, "name": "dog"}],
    "annotations": [{"image_id": 7, "category_id": 18, "id": 1}],
}
CAPTION_RESULTS = [{"image_id": 7, "caption": "A dog, a man and a cat"}]


def changed(value, change):
    value = copy.deepcopy(value)
    change(value)
    return value


@pytest.fixture
def vqa_files(write):
    def files(results=ANSWERS, questions=QUESTIONS, annotations=ANNOTATIONS):
        return [
            "vqa", "--results", write("results.json", results), "--questions", write("questions.json", questions),
            "--annotations", write("annotations.json", annotations),
        ]  # fmt: skip

    return files


def test_vqa(score, vqa_files):
    status, numbers, _ = score(*vqa_files())
    assert status == 0
    assert numbers["overall"] == 50
    assert numbers["per_question"] == {"1": 100, "2": 0}
    assert numbers["per_answer_type"] == {"number": 0, "other": 100}
    _, numbers, _ = score(*vqa_files(), "--normalise", "official")
    assert numbers["per_question"] == {"1": 0, "2": 0}


def test_intervals_are_over_images_and_not_over_their_questions(score, write, tmp_path):
    ids = range(40)  # two questions an image, answered alike
    asked = {"questions": [{"question_id": n, "image_id": n // 2, "question": "?"} for n in ids]}
    truth = {"annotations": [{"question_id": n, "answers": [{"answer": "red"}] * 10} for n in ids]}
    given = [{"question_id": n, "answer": "red" if n < 32 else "blue"} for n in ids]
    files = ("--results", write("r.json", given), "--questions", write("q.json", asked))
    status, numbers, _ = score("vqa", *files, "--annotations", write("a.json", truth))
    assert status == 0 and numbers["overall"] == 80
    share, size, z = 0.8, 20, 1.959964  # Wilson's for as many images, nearly
    half = z * (share * (1 - share) / size + (z / (2 * size)) ** 2) ** 0.5
    ends = [100 * (share + z**2 / (2 * size) + sign * half) / (1 + z**2 / size) for sign in (-1, 1)]
    assert numbers["intervals"]["overall"] == pytest.approx(ends, abs=1.0)
    for place, task in enumerate(("count", "color", "code_reasoning")):
        lines = [f"{n}.jpg\tQ?\tYes\t{'yes' if n % 2 else 'no'}\n{n}.jpg\tR?\tNo\tno\n" for n in range(4 + place)]
        (tmp_path / "mme").mkdir(exist_ok=True)
        (tmp_path / "mme" / f"{task}.txt").write_text("".join(lines))
    _, numbers, _ = score("mme", "--results", tmp_path / "mme", "--subset")
    points = [[50.0, 200.0, 50.0, 200.0], [50.0, 200.0, 50.0, 200.0, 50.0]]
    error = sum(statistics.variance(group) / len(group) for group in points) ** 0.5
    low, high = numbers["intervals"]["Perception"]
    assert (low + high) / 2 == pytest.approx(numbers["Perception"]["total"]) == sum(map(statistics.mean, points))
    assert 2.3 * error < (high - low) / 2 < 2.5 * error  # Student's quantile with 7 degrees of freedom is 2.36
    captions = [{"image_id": n, "caption": "a dog" if n else "a dog and a couch"} for n in range(10)]
    objects = write("o.json", {str(n): ["dog", "cat"] for n in range(10)})
    _, numbers, _ = score("chair", "--results", write("c.json", captions), "--objects", objects)
    low, high = numbers["intervals"]["CHAIRi"]
    # 1 of 11 mentions: the linear part is -1/11 / 1.1 for nine captions and (1 - 2/11) / 1.1 for one
    parts = [(1 - 2 / 11) / 1.1] + [-1 / 11 / 1.1] * 9
    assert (high - low) / 2 == pytest.approx(2.262157 * statistics.stdev(parts) / 10**0.5, rel=1e-6)
    assert numbers["intervals"]["recall"] == [0.5, 0.5]  # one of two, in each


def test_a_question_that_stands_twice_keeps_images_with_their_questions(score, write):
    asked = [{"question_id": n, "image_id": n // 2, "question": "?"} for n in range(40)]
    truth = write(
        "a.json", {"annotations": [{"question_id": n, "answers": [{"answer": "red"}] * 10} for n in range(40)]}
    )
    given = write("r.json", [{"question_id": n, "answer": "red" if n < 32 else "blue"} for n in range(40)])
    ends = []
    for name, rows in (("once.json", asked), ("twice.json", [asked[0], *asked])):
        files = ("--results", given, "--questions", write(name, {"questions": rows}), "--annotations", truth)
        ends.append(score("vqa", *files)[1]["intervals"]["overall"])
    assert ends[0] == ends[1]


def test_vqa_of_a_part_is_asked_for(score, vqa_files):
    status, _, message = score(*vqa_files(ANSWERS[:1]))
    assert (status, "without result (1: 2)" in message, "--subset" in message) == (2, True, True)
    assert score(*vqa_files(ANSWERS[:1]), "--subset")[1]["overall"] == 100


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("results", "[{", "results.json: not valid JSON"),
        ("results", "", "not valid JSON|holds no record"),
        ("results", {"answers": []}, "has no field 'question_id'"),
        ("results", [], "holds no result"),
        ("results", [1], "record 0: a JSON object is expected, found a number"),
        ("results", [*ANSWERS, ANSWERS[0]], "record 2: question_id 1 stands twice"),
        ("results", [{"question_id": 1, "answer": None}], "record 0: field 'answer' must be a string, found null"),
        ("results", [{"question_id": [], "answer": "a"}], "field 'question_id' must be"),
        ("results", [*ANSWERS, {"question_id": 3, "answer": "a"}], "not in .*questions.json .1: 3"),
        ("questions", [], "questions.json: a JSON object is expected, found an array"),
        ("questions", {"annotations": []}, "has no 'questions'"),
        ("annotations", {"annotations": ANNOTATIONS["annotations"][:1]}, "without annotation .1: 2"),
        ("annotations", {"annotations": ANNOTATIONS["annotations"] * 2}, "annotation 2: question_id 1 stands twice"),
        (
            "annotations",
            changed(ANNOTATIONS, lambda a: a["annotations"][1].pop("answers")),
            "annotation 1: has no 'ans",
        ),
        ("annotations", changed(ANNOTATIONS, lambda a: a["annotations"][1].update(answers=[])), "'answers' is empty"),
        (
            "annotations",
            changed(ANNOTATIONS, lambda a: a["annotations"][0].update(answers=[{"a": 1}])),
            "answer 0: has no field 'answer'",
        ),
    ],
)
def test_vqa_bad_files(score, vqa_files, part, value, says):
    import re

    status, numbers, message = score(*vqa_files(**{part: value}))
    assert (status, numbers) == (2, None)
    assert re.search(says, message), message
    assert len(message.strip().splitlines()) == 1


def test_an_odd_id_stays_as_it_is_and_messages_quote_it(score, vqa_files, write):
    odd = "a\nb\ud800"
    questions = {"questions": [{"question_id": odd}]}
    notes = {"annotations": [{"question_id": odd, "answers": [{"answer": "dog"}] * 10}]}
    answers = [{"question_id": odd, "answer": "dog"}]
    assert score(*vqa_files(answers, questions, notes))[1]["per_question"] == {odd: 100}
    twice = {"annotations": notes["annotations"] * 2}
    unnamed = {**INSTANCES, "annotations": [{"image_id": 7, "category_id": odd}]}
    chair = ("chair", "--results", write("r.json", CAPTION_RESULTS))
    for arguments in (
        vqa_files(answers * 2, questions, notes), vqa_files(answers, questions, twice), vqa_files(answers),
        (*chair, "--instances", write("i.json", unnamed), "--captions", write("c.json", CAPTIONS)),
        (*chair, "--objects", write("o.json", {odd: 1})),
    ):  # fmt: skip
        status, _, message = score(*arguments)
        assert (status, "'a\\nb\\ud800'" in message, len(message.splitlines())) == (2, True, 1), message


def test_missing_file_and_folder(score, tmp_path, write):
    status, _, message = score("mmmu-pro", "--results", tmp_path / "none.jsonl")
    assert (status, "none.jsonl: no such file" in message) == (2, True)
    assert score("seed-bench", "--results", tmp_path)[0] == 2
    assert score("mme", "--results", tmp_path / "none")[0] == 2
    path = tmp_path / "latin.json"
    path.write_bytes(b'[{"id": "\xe9"}]')
    assert "not UTF-8" in score("mmmu-pro", "--results", path)[2]


def test_caption(score, write):
    arguments = ("caption", "--results", write("r.json", CAPTION_RESULTS), "--annotations", write("a.json", CAPTIONS))
    status, numbers, _ = score(*arguments, "--metrics", "CIDEr", "Bleu_1", "ROUGE_L")
    assert status == 0
    assert numbers["CIDEr"] == 0.0
    assert numbers["per_image"]["7"]["Bleu_1"] == numbers["Bleu_1"] > 0
    assert "SPICE" in numbers["not_scored"]
    other = write("r.json", [{"image_id": 8, "caption": "x"}])
    status, _, message = score("caption", "--results", other, "--annotations", write("a.json", CAPTIONS))
    assert (status, "1: 8" in message) == (2, True)


def test_chair(score, write):
    results = write("r.json", CAPTION_RESULTS)
    truth = ("--instances", write("i.json", INSTANCES), "--captions", write("c.json", CAPTIONS))
    status, numbers, _ = score("chair", "--results", results, *truth)
    assert status == 0
    assert (numbers["CHAIRs"], numbers["CHAIRi"], numbers["recall"]) == pytest.approx((1, 1 / 3, 2 / 3))
    assert numbers["n_captions"] == 1
    assert numbers["sentences"][0]["image_id"] == 7
    objects = ("--objects", write("o.json", {"7": ["dog", "person", "couch"]}))
    assert score("chair", "--results", results, *objects)[1] == numbers
    for wrong in ((), truth[:2], truth[2:], truth + objects):
        assert score("chair", "--results", results, *wrong)[0] == 2
    assert (
        "unknown object 'dgo'" in score("chair", "--results", results, "--objects", write("o.json", {"7": ["dgo"]}))[2]
    )


def test_mme_folder(score, tmp_path):
    from pipeline.scores.mme import GROUPS

    lines = "a.jpg\tQ?\tYes\tyes\na.jpg\tR?\tNo\tNo, it is not\n\n"
    for tasks in GROUPS.values():
        for task in tasks:
            (tmp_path / f"{task}.txt").write_text(lines)
    status, numbers, _ = score("mme", "--results", tmp_path)
    assert (status, numbers["Perception"]["total"], numbers["Cognition"]["total"]) == (0, 2000, 800)
    (tmp_path / "OCR.txt").unlink()
    status, _, message = score("mme", "--results", tmp_path)
    assert (status, "lacks OCR.txt" in message) == (2, True)
    assert score("mme", "--results", tmp_path, "--subset")[1]["Perception"]["total"] == 1800
    (tmp_path / "count.txt").write_text("a.jpg\tQ?\tYes\n")
    assert "count.txt, line 1: has 3 columns" in score("mme", "--results", tmp_path, "--subset")[2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["question_id", "answer", "answers", "questions", "annotations", "image_id", "caption", "id", "options",
             "response", "prediction", "gt_answer", "images", "categories", "category_id", "name"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values, cut=st.integers(0, 200))
def test_no_file_ends_in_a_traceback(tmp_path, capsys, value, cut):
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    whole.write_text(json.dumps(value))
    part.write_text(json.dumps(ANNOTATIONS)[:cut])
    good = tmp_path / "good.json"
    good.write_text(json.dumps(ANSWERS))
    for path in (whole, part):
        for arguments in (
            ["vqa", "--results", path, "--questions", path, "--annotations", path],
            ["vqa", "--results", good, "--questions", path, "--annotations", path],
            ["caption", "--results", path, "--annotations", path, "--metrics", "CIDEr"],
            ["chair", "--results", path, "--objects", path],
            ["chair", "--results", path, "--instances", path, "--captions", path],
            ["seed-bench", "--results", path],
            ["seed-bench", "--results", good, "--questions", path],
            ["mmmu-pro", "--results", path],
            ["mme", "--results", path],
        ):
            status = main([str(argument) for argument in arguments])
            output = capsys.readouterr()
            assert status in (0, 2), output.err
            assert (status == 2) == bool(output.err)
