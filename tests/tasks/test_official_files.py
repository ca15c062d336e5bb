"""The tasks on small files in the official shape: reading, targets, prompts, errors, scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.support.synthetic import SyntheticSize, write_vqav2
from pipeline import backbones, tasks
from pipeline.core.errors import InputError
from pipeline.evaluate.generate import cut_at_stop
from pipeline.prompts.prompt import stop_strings
from pipeline.tasks.vqa import most_frequent

SIZE = SyntheticSize(num_questions=40, num_images=9)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for subset, first in (("train2014", 1), ("val2014", 500)):
        write_vqav2(tmp_path, subset, SIZE, first_image=first)
        (tmp_path / "images" / subset).mkdir(parents=True)
    return tmp_path


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def questions(root: Path, subset: str = "train2014") -> Path:
    return root / "vqav2" / f"v2_OpenEnded_mscoco_{subset}_questions.json"


def annotations(root: Path, subset: str = "train2014") -> Path:
    return root / "vqav2" / f"v2_mscoco_{subset}_annotations.json"


def failure(root: Path, name: str = "vqav2", split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        list(tasks.get(name).read(root, split))
    return str(caught.value)


def test_every_task_is_complete():
    for name in tasks.names():
        task = tasks.get(name)
        assert task.name == name
        assert task.stands_for in tasks.names()
        assert task.unit in {"percent", "fraction"}
        assert "{image}" in task.template.query
        assert task.template.answer == " {answer}\n"
        assert task.max_new_tokens > 0


def test_samples_join_questions_and_annotations_by_id(root):
    task = tasks.get("vqav2")
    edit(annotations(root), lambda whole: whole["annotations"].reverse())
    samples = list(task.read(root, "train"))
    asked = {q["question_id"]: q for q in json.loads(questions(root).read_text())["questions"]}
    given = {a["question_id"]: a for a in json.loads(annotations(root).read_text())["annotations"]}
    assert [s.sample_id for s in samples] == list(asked)
    for sample in samples:
        assert sample.question == asked[sample.sample_id]["question"]
        answers = tuple(answer["answer"] for answer in given[sample.sample_id]["answers"])
        assert sample.references == answers and len(answers) == 10
        assert sample.target == most_frequent(answers)
        image_id = asked[sample.sample_id]["image_id"]
        assert sample.images[0].path == f"images/train2014/COCO_train2014_{image_id:012d}.jpg"
        assert sample.meta["answer_type"] == given[sample.sample_id]["answer_type"]


def test_index_and_read_agree_and_read_keeps_only_what_is_asked_for(root):
    task = tasks.get("vqav2")
    samples = list(task.read(root, "evaluation"))
    entries = list(task.index(root, "evaluation"))
    assert [(s.sample_id, (s.images[0].path,), None) for s in samples] == entries
    wanted = {samples[7].sample_id, samples[3].sample_id}
    assert list(task.read(root, "evaluation", wanted)) == [samples[3], samples[7]]


def test_the_target_is_the_most_frequent_answer_ties_to_the_first():
    assert most_frequent(["b", "a", "a", "c"]) == "a"
    assert most_frequent(["b", "a", "a", "b", "c"]) == "b"
    assert most_frequent(["c", "b", "a"]) == "c"


def test_questions_without_annotation_are_listed_with_their_ids(root):
    whole = json.loads(questions(root).read_text())["questions"]
    edit(annotations(root), lambda content: content.update(annotations=content["annotations"][13:]))
    text = failure(root)
    assert "13 question(s)" in text and "have no annotation" in text and "and 3 more" in text
    assert all(str(question["question_id"]) in text for question in whole[:10])
    with pytest.raises(InputError, match="13 question"):  # also where none of them is wanted
        list(tasks.get("vqav2").read(root, "train", {whole[20]["question_id"]}))


def test_swapped_splits_are_named(root):
    questions(root).write_text(questions(root, "val2014").read_text())
    assert "'data_subtype' is 'val2014', but 'train2014' is needed" in failure(root)


def test_truncated_annotations_are_named(root):
    data = annotations(root).read_bytes()
    annotations(root).write_bytes(data[: len(data) // 2])
    text = failure(root)
    assert str(annotations(root)) in text and "of 'annotations'" in text and "cut short" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a[3].pop("answers"), "field 'answers' is missing"),
        (lambda a: a[3]["answers"].pop(), "has 9 answers, the official files have 10"),
        (lambda a: a[3]["answers"][4].pop("answer"), "answer 4: field 'answer' is missing"),
        (lambda a: a[3]["answers"].__setitem__(4, "yes"), "an answer is 'yes'"),
        (lambda a: a[3].pop("question_id"), "field 'question_id' is missing"),
        (lambda a: a[3].update(question_id="4000"), "(string). It must be a whole number"),
        (lambda a: a[3].update(image_id=77), "image_id is 77, the question's is 4"),
        (lambda a: a.insert(3, a[2]), "has two annotations"),
    ],
)
def test_bad_records_are_named(root, change, says):
    edit(annotations(root), lambda whole: change(whole["annotations"]))
    text = failure(root)
    assert says in text and "record 3 of 'annotations'" in text


def test_a_repeated_question_is_named(root):
    edit(questions(root), lambda whole: whole["questions"].append(whole["questions"][0]))
    assert "question_id 1000 stands twice" in failure(root)


def test_missing_files_list_every_place_looked_at(root):
    questions(root).unlink()
    text = failure(root)
    assert "vqav2/v2_OpenEnded_mscoco_train2014_questions.json" in text and "VQAv2/v2_Open" in text
    (root / "images" / "val2014").rmdir()
    text = failure(root, split="evaluation")
    for place in ("images/val2014", "coco/val2014", "coco/images/val2014"):
        assert place in text


def test_images_are_also_found_beside_the_annotations(root):
    (root / "images" / "train2014").rmdir()
    (root / "coco" / "train2014").mkdir(parents=True)
    sample = next(tasks.get("vqav2").read(root, "train"))
    assert sample.images[0].path.startswith("coco/train2014/COCO_train2014_")


def test_the_miniature_reads_the_same_names_in_one_folder(root):
    flat = root / "flat"
    flat.mkdir()
    for path in (questions(root), annotations(root)):
        path.rename(flat / path.name)
    (flat / "train2014").mkdir()
    sample = next(tasks.get("mini-vqa").read(flat, "train"))
    assert sample.task == "mini-vqa"
    assert sample.images[0].path == "train2014/COCO_train2014_000000000001.png"


def coco_file(root: Path, subset: str = "train2014", *, captions: int = 6, images: int = 3) -> Path:
    path = root / "coco" / "annotations" / f"captions_{subset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = range(391_895, 391_895 + images)
    path.write_text(
        json.dumps(
            {
                "info": {},
                "images": [{"file_name": f"COCO_{subset}_{i:012d}.jpg", "id": i} for i in ids],
                "licenses": [],
                "annotations": [
                    {"image_id": i, "id": 10 * i + n, "caption": f" A man on\na moped, number {n}. "}
                    for n in range(captions)
                    for i in ids
                ],
            }
        )
    )
    return path


def test_captions_keep_all_references_and_the_target_is_one_line(root):
    coco_file(root)
    samples = list(tasks.get("coco").read(root, "train"))
    assert [sample.sample_id for sample in samples] == [391_895, 391_896, 391_897]
    assert samples[0].question is None
    assert samples[0].target == "A man on a moped, number 0."
    assert len(samples[0].references) == 6 and samples[0].references[5] == " A man on\na moped, number 5. "
    assert samples[0].images[0].path == "images/train2014/COCO_train2014_000000391895.jpg"
    assert [e.sample_id for e in tasks.get("coco").index(root, "train")] == [391_895, 391_896, 391_897]
    assert list(tasks.get("coco").read(root, "train", {391_896})) == [samples[1]]


def test_bad_caption_files_are_named(root):
    path = coco_file(root)
    whole = path.read_text()
    edit(path, lambda content: content["annotations"].__delitem__(slice(1, None)))
    assert "2 image(s) have no caption: image id 391896, 391897" in failure(root, "coco")
    path.write_text(whole.replace("COCO_train2014_", "COCO_val2014_"))
    assert "is of another split than train2014" in failure(root, "coco")
    path.write_text(whole.replace("COCO_train2014_", "../"))
    assert "no plain file name" in failure(root, "coco")
    path.write_text(whole[:200])
    assert "cut short" in failure(root, "coco")


def test_output_is_cut_at_the_first_stop_word_or_newline():
    backbone = backbones.get("mini-idefics2")
    vqa, caption = (stop_strings(tasks.get(name).template, backbone) for name in ("vqav2", "coco"))
    assert cut_at_stop(" two dogs\nImage:", vqa) == "two dogs"
    assert cut_at_stop(" two Question: what", vqa) == "two"
    assert cut_at_stop(" two Image: Answer: Question:", vqa) == "two"
    assert cut_at_stop("a Caption", vqa) == "a Caption"
    assert cut_at_stop(" A man. Caption: b", caption) == "A man."
    assert cut_at_stop("Image", caption) == ""


def test_the_prompts_read_as_the_methods_say():
    template = tasks.get("okvqa").template
    demo = (template.query + template.answer).format(image="<image>", question="Q?", answer="yes")
    assert demo == "Image: <image> Question: Q? Answer: yes\n"
    assert template.prefix == "Instruction: provide an answer to the question. Use the image to answer.\n"
    template = tasks.get("coco").template
    assert (template.query + template.answer).format(image="<image>", answer="A dog.") == (
        "Image: <image> Caption: A dog.\n"
    )
    assert template.prefix_needs_demos


def test_vqa_is_scored_over_all_samples_or_not_at_all(root):
    task = tasks.get("vqav2")
    samples = list(task.read(root, "evaluation"))
    right = {sample.sample_id: sample.target.upper() for sample in samples}
    score = task.score(samples, right)
    assert score.metric == "accuracy" and 60 < score.value <= 100
    assert score.value == pytest.approx(sum(score.per_sample.values()) / len(samples))
    assert set(score.details["per_answer_type"]) == {"number", "yes/no", "other"}
    assert task.score(samples, dict.fromkeys(right, "zebra")).value == 0
    right.pop(samples[0].sample_id)
    with pytest.raises(InputError, match=f"1 of 40 samples have no prediction: {samples[0].sample_id}"):
        task.score(samples, right)
    with pytest.raises(InputError, match="no samples to score"):
        task.score([], {})


def test_captions_are_scored_together(root):
    path = coco_file(root)

    def tell_apart(content: dict) -> None:
        scenes = ("a man rides a moped", "two cats sleep on a bed", "a red bus stops in town")
        for number, annotation in enumerate(content["annotations"]):
            annotation["caption"] = scenes[number % 3]

    edit(path, tell_apart)
    task = tasks.get("coco")
    samples = list(task.read(root, "train"))
    score = task.score(samples, {sample.sample_id: sample.target for sample in samples})
    assert score.metric == "CIDEr" and score.value == pytest.approx(10.0)
    assert score.per_sample == pytest.approx({sample.sample_id: 10.0 for sample in samples})
    assert task.score(samples[:1], {samples[0].sample_id: samples[0].target}).value == 0  # no document frequency
