"""`hificl score ..`: official result files in, one JSON object out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.scores import chair, mme, mmmu_pro, seed_bench, vqa
from pipeline.scores.files import (
    as_object,
    id_field,
    need,
    read_json,
    read_records,
    results_by_id,
    section,
    shown,
    some,
    text_field,
)
from pipeline.scores.objects import categories_of
from pipeline.scores.stems import stem_answer

# Any subparsers object of argparse; its class has no public name.
SubParsers = Any


def register(subparsers: SubParsers) -> None:
    """Add the sub-commands of `hificl score` to an argparse subparsers object.

    Each sets `func`, a function from the parsed arguments to a dict that is ready for json.dumps.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returned.
    """
    parser = _add(subparsers, "vqa", score_vqa, "VQA accuracy, percent")
    _results(parser, '[{"question_id": .., "answer": ".."}]')
    parser.add_argument("--questions", required=True, metavar="Q", help="official questions file")
    parser.add_argument("--annotations", required=True, metavar="A", help="official annotations file")
    parser.add_argument(
        "--normalise",
        choices=vqa.NORMALISATIONS,
        default="always",
        help="always (default, MimIC's scorer and the papers' figures) or official (not where all annotators agree)",
    )
    parser.add_argument("--subset", action="store_true", help="accept results for a part of the questions")
    parser.add_argument(
        "--stem", action="store_true", help="compare the stems of the results: for OK-VQA, whose answers are stems"
    )

    parser = _add(subparsers, "caption", score_caption, "CIDEr-D, BLEU, METEOR, ROUGE-L, fractions")
    _results(parser, '[{"image_id": .., "caption": ".."}]')
    parser.add_argument("--annotations", required=True, metavar="A", help="official captions file")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=None,
        metavar="M",
        help="CIDEr Bleu_1..4 METEOR ROUGE_L SPICE (default: all, SPICE only if named)",
    )

    parser = _add(subparsers, "chair", score_chair, "CHAIR_s, CHAIR_i and recall of objects, fractions")
    _results(parser, '[{"image_id": .., "caption": ".."}]')
    parser.add_argument("--instances", nargs="+", default=[], metavar="I", help="official instances files")
    parser.add_argument("--captions", nargs="+", default=[], metavar="C", help="official captions files")
    parser.add_argument("--objects", metavar="O", help='ready ground truth, {"image_id": ["object", ..]}')

    parser = _add(subparsers, "mme", score_mme, "MME: points of perception and cognition")
    parser.add_argument("--results", required=True, metavar="DIR", help="folder of <subtask>.txt")
    parser.add_argument("--subset", action="store_true", help="accept a folder that lacks subtasks")

    parser = _add(subparsers, "seed-bench", score_seed_bench, "SEED-Bench accuracy, a fraction")
    _results(parser, '{"question_id": "..", "prediction": "A", "gt_answer": "A"} a line')
    parser.add_argument("--questions", metavar="Q", help="SEED-Bench.json: answers and dimensions")

    parser = _add(subparsers, "mmmu-pro", score_mmmu_pro, "MMMU-Pro accuracy, a fraction")
    _results(parser, '{"id": .., "options": .., "answer": "A", "response": ".."} a line')
    parser.add_argument("--seed", type=int, default=0, help="of the letters drawn for unreadable replies (default 0)")


def _add(
    subparsers: SubParsers, name: str, run: Callable[[argparse.Namespace], dict[str, Any]], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=summary, description=summary)
    parser.set_defaults(func=run)
    return parser


def _results(parser: argparse.ArgumentParser, shape: str) -> None:
    parser.add_argument("--results", required=True, metavar="R", help=f"result file: {shape}")


def score_vqa(args: argparse.Namespace) -> dict[str, Any]:
    """Return VQA accuracy of an official result file.

    Raises:
        InputError: a bad file; results for unknown questions; questions without annotation or, unless
            `--subset` is given, without result.
    """
    predictions = results_by_id(args.results, "question_id", "answer")
    asked = _ids(section(read_json(args.questions), "questions", args.questions), "question_id", args.questions)
    annotations = _annotations(args.annotations, predictions)
    unknown = [key for key in predictions if key not in asked]
    if unknown:
        raise InputError(
            f"results for questions that are not in {args.questions} ({some(unknown)})",
            where=str(args.results),
            way_out="Give the questions file of the same split",
        )
    unannotated = [key for key in (predictions if args.subset else asked) if key not in annotations]
    if unannotated:
        raise InputError(
            f"questions without annotation ({some(unannotated)})",
            where=str(args.annotations),
            way_out="Give the annotations file of the same split and release",
        )
    unanswered = [key for key in asked if key not in predictions]
    if unanswered and not args.subset:
        raise InputError(
            f"questions without result ({some(unanswered)})",
            where=str(args.results),
            way_out="Answer every question, or pass --subset to score those that are answered",
        )
    if args.stem:
        predictions = {key: stem_answer(answer) for key, answer in predictions.items()}
    return vqa.vqa_accuracy(
        predictions,
        {key: annotations[key]["answers"] for key in predictions},
        args.normalise,
        answer_types=_named(annotations, "answer_type"),
        question_types=_named(annotations, "question_type"),
    ).as_dict()


def _ids(rows: Sequence[Mapping[str, Any]], name: str, where: str) -> dict[str, None]:
    return dict.fromkeys(id_field(row, name, f"{where}, record {number}") for number, row in enumerate(rows))


def _annotations(path: str, wanted: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return {question id: annotation}; the answers of questions that are not `wanted` are left as they stand."""
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(section(read_json(path), "annotations", path)):
        where = f"{path}, annotation {number}"
        key = id_field(row, "question_id", where)
        if key in found:
            raise InputError(
                f"question_id {shown(key)} stands twice", where=where, way_out="Keep one annotation a question"
            )
        if key not in wanted:  # the official file has 20 times the questions that are usually scored
            found[key] = row
            continue
        answers = section(row, "answers", where)
        if not answers:
            raise InputError("field 'answers' is empty", where=where, way_out="A question needs at least one answer")
        found[key] = {
            **row,
            "answers": [text_field(answer, "answer", f"{where}, answer {at}") for at, answer in enumerate(answers)],
        }
    return found


def _named(annotations: Mapping[str, Mapping[str, Any]], field: str) -> dict[str, str]:
    return {key: row[field] for key, row in annotations.items() if isinstance(row.get(field), str)}


def score_caption(args: argparse.Namespace) -> dict[str, Any]:
    """Return the caption metrics of an official result file; only the images in it are scored.

    Raises:
        InputError: a bad file, or images without reference caption.
        WorkError: Java is missing or failed.
    """
    # Only captions need pycocoevalcap and Java; the other scores run without them.
    from pipeline.scores import caption

    predictions = results_by_id(args.results, "image_id", "caption")
    references = _captions(args.annotations)
    _need(predictions, references, args.results, f"a reference caption in {args.annotations}")
    # The published program goes through the images of the annotations file, and the tokenizer minds the order.
    predictions = {key: predictions[key] for key in references if key in predictions}
    metrics = caption.METRICS if args.metrics is None else tuple(args.metrics)
    numbers = caption.caption_scores(predictions, references, metrics).as_dict()
    lacking = caption.spice_missing()
    if "SPICE" not in metrics:
        numbers["not_scored"] = {"SPICE": lacking or "its models are at hand; name it in --metrics"}
    return numbers


def _captions(path: str) -> dict[str, list[str]]:
    """Return {image id: captions}, in the order of the file's images where it lists them."""
    content = as_object(read_json(path), path)
    images = section(content, "images", path) if "images" in content else []
    found: dict[str, list[str]] = {
        id_field(row, "id", f"{path}, image {number}"): [] for number, row in enumerate(images)
    }
    for number, row in enumerate(section(content, "annotations", path)):
        where = f"{path}, annotation {number}"
        found.setdefault(id_field(row, "image_id", where), []).append(text_field(row, "caption", where))
    return {key: texts for key, texts in found.items() if texts}


def _need(predictions: Mapping[str, str], known: Mapping[str, Any], results: str, what: str) -> None:
    way_out = "Give the annotations of the same split, or drop these images"
    need(predictions, known, what, where=str(results), way_out=way_out)


def score_chair(args: argparse.Namespace) -> dict[str, Any]:
    """Return CHAIR of an official result file.

    Raises:
        InputError: a bad file, no ground truth or two, or images without ground truth.
    """
    annotated = bool(args.instances and args.captions)
    if bool(args.objects) == bool(args.instances or args.captions) or not (args.objects or annotated):
        raise InputError(
            "the ground truth is not clear",
            where="hificl score chair",
            way_out="Give --instances and --captions together, or --objects alone",
        )
    predictions = results_by_id(args.results, "image_id", "caption")
    if args.objects:
        objects = _objects(args.objects)
        _need(predictions, objects, args.results, f"objects in {args.objects}")
    else:
        categories = categories_of(args.instances)
        captions: dict[str, list[str]] = {}
        for path in args.captions:
            for key, texts in _captions(path).items():
                if key in predictions:
                    captions.setdefault(key, []).extend(texts)
        _need(predictions, categories, args.results, f"an entry in {', '.join(args.instances)}")
        _need(predictions, captions, args.results, f"a reference caption in {', '.join(args.captions)}")
        objects = chair.ground_truth({key: categories[key] for key in predictions}, captions)
    numbers = chair.chair_scores(predictions, objects).as_dict()
    for sentence in numbers["sentences"]:
        sentence["image_id"] = _as_in_coco(sentence["image_id"])
    return numbers


def _as_in_coco(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() else key


def _objects(path: str) -> dict[str, set[str]]:
    found = {}
    for key, names in as_object(read_json(path), path).items():
        where = f"{path}, image {shown(key)}"
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError("an array of object names is expected", where=where, way_out='{"image_id": ["object"]}')
        found[key] = {chair.category(name, where) for name in names}
    return found


def score_mme(args: argparse.Namespace) -> dict[str, Any]:
    """Return MME's points of an official result folder.

    Raises:
        InputError: a missing subtask, a line that lacks a column, a question without its partner.
    """
    return mme.mme_scores(mme.read_results(args.results, subset=args.subset)).as_dict()


def score_seed_bench(args: argparse.Namespace) -> dict[str, Any]:
    """Return the SEED-Bench accuracy of a result file.

    Raises:
        InputError: a bad file or row, or an unknown question.
    """
    rows = read_records(args.results)
    known = None
    if args.questions:
        content = as_object(read_json(args.questions), args.questions)
        known = seed_bench.questions(content, section(content, "questions", args.questions), args.questions)
    return seed_bench.seed_bench_scores(rows, known, str(args.results)).as_dict()


def score_mmmu_pro(args: argparse.Namespace) -> dict[str, Any]:
    """Return the MMMU-Pro accuracy of a result file.

    Raises:
        InputError: a bad file or row.
    """
    path = Path(args.results)
    return mmmu_pro.mmmu_pro_scores(read_records(path), args.seed, str(path)).as_dict()
