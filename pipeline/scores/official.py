"""Scores of official result files, as JSON has them: what `hificl score` prints."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.core.statistics import interval, ratio_interval, sum_interval
from pipeline.scores import chair, mme, mmmu_pro, seed_bench, vqa
from pipeline.scores.files import (
    JsonObject,
    as_object,
    first_few,
    id_field,
    need,
    printable,
    read_json,
    read_records,
    record_list,
    results_by_id,
    text_field,
)
from pipeline.scores.vqa import stem_answer


def score_vqa(
    results: str, questions: str, annotations: str, *, normalise: str = "always", subset: bool = False,
    stem: bool = False,
) -> JsonObject:  # fmt: skip
    """Return VQA accuracy of an official result file.

    Args:
        results: file of answers.
        questions: official file.
        annotations: official file.
        normalise: one of `vqa.NORMALISATIONS`.
        subset: accept results for a part of the questions.
        stem: compare the stems of the results (OK-VQA).

    Raises:
        InputError: a bad file; results for unknown questions; questions without annotation or, unless
            `--subset` is given, without result.
    """
    predictions = results_by_id(results, "question_id", "answer")
    records = record_list(read_json(questions), "questions", questions)
    ids = [id_field(row, "question_id", f"{questions}, record {at}") for at, row in enumerate(records)]
    asked = dict.fromkeys(ids)
    annotated = _annotations(annotations, predictions)
    unknown = [key for key in predictions if key not in asked]
    if unknown:
        raise InputError(
            f"results for questions that are not in {questions} ({first_few(unknown)})",
            where=str(results),
            way_out="Give the questions file of the same split",
        )
    unannotated = [key for key in (predictions if subset else asked) if key not in annotated]
    if unannotated:
        raise InputError(
            f"questions without annotation ({first_few(unannotated)})",
            where=str(annotations),
            way_out="Give the annotations file of the same split and release",
        )
    unanswered = [key for key in asked if key not in predictions]
    if unanswered and not subset:
        way_out = "Answer every question, or pass --subset to score those that are answered"
        raise InputError(f"questions without result ({first_few(unanswered)})", where=str(results), way_out=way_out)
    if stem:
        predictions = {key: stem_answer(answer) for key, answer in predictions.items()}
    score = vqa.vqa_accuracy(
        predictions,
        {key: annotated[key].answers for key in predictions},
        normalise,
        answer_types={key: row.answer_type for key, row in annotated.items() if row.answer_type is not None},
        question_types={key: row.question_type for key, row in annotated.items() if row.question_type is not None},
    )
    images = {key: str(row.get("image_id", key)) for key, row in zip(ids, records, strict=True)}
    of_each = [images.get(key, key) for key in score.per_question]
    return _with_intervals(score.as_dict(), overall=interval(list(score.per_question.values()), 100.0, of_each))


def _with_intervals(numbers: JsonObject, **intervals: tuple[float, float] | None) -> JsonObject:
    """Return numbers with the 95 % intervals over images of those that have one."""
    return {**numbers, "intervals": {name: list(ends) for name, ends in intervals.items() if ends is not None}}


@dataclass(frozen=True)
class _Annotation:
    answers: list[str]
    answer_type: str | None
    question_type: str | None


def _annotations(path: str, wanted: Mapping[str, str]) -> dict[str, _Annotation]:
    """Return {question id: annotation}; the answers are read of the questions that are `wanted` alone."""
    annotations: dict[str, _Annotation] = {}
    for number, row in enumerate(record_list(read_json(path), "annotations", path)):
        place = f"{path}, annotation {number}"
        key = id_field(row, "question_id", place)
        if key in annotations:
            raise InputError(
                f"question_id {printable(key)} stands twice", where=place, way_out="Keep one annotation a question"
            )
        texts = []
        if key in wanted:  # the official file has 20 times the questions that are usually scored
            answers = record_list(row, "answers", place)
            if not answers:
                raise InputError(
                    "field 'answers' is empty", where=place, way_out="A question needs at least one answer"
                )
            texts = [text_field(answer, "answer", f"{place}, answer {at}") for at, answer in enumerate(answers)]
        answer_type, question_type = row.get("answer_type"), row.get("question_type")
        annotations[key] = _Annotation(
            texts,
            answer_type if isinstance(answer_type, str) else None,
            question_type if isinstance(question_type, str) else None,
        )
    return annotations


def score_caption(results: str, annotations: str, metrics: Sequence[str] | None = None) -> JsonObject:
    """Return the caption metrics of an official result file; only the images in it are scored.

    Raises:
        InputError: a bad file, or images without reference caption.
        WorkError: Java is missing or failed.
    """
    # Only captions need pycocoevalcap and Java; the other scores run without them.
    from pipeline.scores import caption

    predictions = results_by_id(results, "image_id", "caption")
    references = _captions(annotations)
    _need(predictions, references, results, f"a reference caption in {annotations}")
    # In the order of the annotations file, as in the published program: the tokenizer's output depends on it.
    predictions = {key: predictions[key] for key in references if key in predictions}
    asked = caption.METRICS if metrics is None else tuple(metrics)
    score = caption.caption_scores(predictions, references, asked)
    numbers = score.as_dict()
    lacking = caption.spice_missing()
    if "SPICE" not in asked:
        numbers["not_scored"] = {"SPICE": lacking or "its models are at hand; name it in --metrics"}
    by_image = {name: [row[name] for row in score.per_image.values() if name in row] for name in score.overall}
    means = {  # BLEU and METEOR are no means over captions
        name: interval(values)
        for name, values in by_image.items()
        if values and math.isclose(math.fsum(values) / len(values), score.overall[name], rel_tol=1e-6, abs_tol=1e-9)
    }
    return _with_intervals(numbers, **means)


def _captions(path: str) -> dict[str, list[str]]:
    """Return {image id: captions}, in the order of the file's images where it lists them."""
    content = as_object(read_json(path), path)
    images = record_list(content, "images", path) if "images" in content else []
    captions: dict[str, list[str]] = {
        id_field(row, "id", f"{path}, image {number}"): [] for number, row in enumerate(images)
    }
    for number, row in enumerate(record_list(content, "annotations", path)):
        place = f"{path}, annotation {number}"
        captions.setdefault(id_field(row, "image_id", place), []).append(text_field(row, "caption", place))
    return {key: texts for key, texts in captions.items() if texts}


def _need(predictions: Mapping[str, str], known: Container[object], results: str, needed: str) -> None:
    way_out = "Give the annotations of the same split, or drop these images"
    need(predictions, known, needed, where=str(results), way_out=way_out)


def score_chair(
    results: str, *, instances: Sequence[str] = (), captions: Sequence[str] = (), objects: str | None = None
) -> JsonObject:
    """Return CHAIR of an official result file.

    Raises:
        InputError: a bad file, no ground truth or two, or images without ground truth.
    """
    annotated = bool(instances and captions)
    if bool(objects) == bool(instances or captions) or not (objects or annotated):
        way_out = "Give --instances and --captions together, or --objects alone"
        raise InputError("the ground truth is not clear", where="hificl score chair", way_out=way_out)
    predictions = results_by_id(results, "image_id", "caption")
    if objects:
        truth = _objects(objects)
        _need(predictions, truth, results, f"objects in {objects}")
    else:
        categories = chair.categories_of(instances)
        references: dict[str, list[str]] = {}
        for path in captions:
            for key, texts in _captions(path).items():
                if key in predictions:
                    references.setdefault(key, []).extend(texts)
        _need(predictions, categories, results, f"an entry in {', '.join(instances)}")
        _need(predictions, references, results, f"a reference caption in {', '.join(captions)}")
        truth = chair.ground_truth({key: categories[key] for key in predictions}, references)
    score = chair.chair_scores(predictions, truth)
    sentences = [replace(sentence, image_id=_as_in_coco(sentence.image_id)) for sentence in score.sentences]
    wrong = [len(sentence.mscoco_hallucinated_words) for sentence in sentences]
    named = [len(sentence.mscoco_generated_words) for sentence in sentences]
    there = [set(sentence.mscoco_gt_words) for sentence in sentences]
    recalled = [len(words & set(row.mscoco_generated_words)) for words, row in zip(there, sentences, strict=True)]
    return _with_intervals(
        replace(score, sentences=sentences).as_dict(),
        CHAIRs=interval([float(sentence.CHAIRs) for sentence in sentences], 1.0),
        CHAIRi=ratio_interval(wrong, named),
        recall=ratio_interval(recalled, [len(words) for words in there]),
    )


def _as_in_coco(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() else key


def _objects(path: str) -> dict[str, set[str]]:
    objects = {}
    for key, names in as_object(read_json(path), path).items():
        place = f"{path}, image {printable(key)}"
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError("an array of object names is expected", where=place, way_out='{"image_id": ["object"]}')
        objects[key] = {chair.category(name, place) for name in names}
    return objects


def score_mme(results: str, *, subset: bool = False) -> JsonObject:
    """Return MME's points of an official result folder.

    Raises:
        InputError: a missing subtask, a line that lacks a column, a question without its partner.
    """
    score = mme.mme_scores(mme.read_results(results, subset=subset))
    points = {
        name: sum_interval([score.tasks[task].by_image for task in tasks if task in score.tasks])
        for name, tasks in mme.GROUPS.items()
    }
    return _with_intervals(score.as_dict(), **points)


def score_seed_bench(results: str, questions: str | None = None) -> JsonObject:
    """Return the SEED-Bench accuracy of a result file.

    Raises:
        InputError: a bad file or row, or an unknown question.
    """
    rows = read_records(results)
    known = None
    if questions:
        content = as_object(read_json(questions), questions)
        known = seed_bench.questions(content, record_list(content, "questions", questions), questions)
    score = seed_bench.seed_bench_scores(rows, known, str(results))
    questions_of = [row.question_id for row in score.rows]  # one that stands twice counts once
    right = [float(row.if_right) for row in score.rows]
    return _with_intervals(score.as_dict(), accuracy=interval(right, 1.0, questions_of))


def score_mmmu_pro(results: str, *, seed: int = 0) -> JsonObject:
    """Return the MMMU-Pro accuracy of a result file.

    Raises:
        InputError: a bad file or row.
    """
    path = Path(results)
    score = mmmu_pro.mmmu_pro_scores(read_records(path), seed, str(path))
    return _with_intervals(score.as_dict(), accuracy=interval([float(row.if_right) for row in score.rows], 1.0))
