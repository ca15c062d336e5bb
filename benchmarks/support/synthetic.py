"""Made-up files in VQAv2's official shape and size: for the benchmark of the draw, and small ones for tests."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FULL_TRAIN_QUESTIONS, FULL_TRAIN_IMAGES = 443_757, 82_783
FULL_VAL_QUESTIONS, FULL_VAL_IMAGES = 214_354, 40_504
NUM_ANSWERS = 10

_INFO = {
    "info": {"description": "Synthetic, in the shape of VQA v2.0.", "version": "2.0", "year": 2017},
    "license": {"url": "", "name": "none; made up"},
    "data_type": "mscoco",
}
_KINDS = (
    ("how many", "number", "How many {} are in the picture?", ("1", "2", "3", "4")),
    ("is the", "yes/no", "Is the {} on the left side of the road?", ("yes", "no", "yes", "maybe")),
    ("what color is the", "other", "What color is the {}?", ("red", "dark blue", "grün-gelb", "white")),
    ("what is the", "other", "What is the {} made of?", ("wood", "steel", "stone", "plastic")),
)
_NOUNS = ("dog", "bus", "café chair", "umbrella", "traffic light", "horse", "surfboard", "giraffe")


@dataclass(frozen=True)
class SyntheticSize:
    """How much to write for one split: questions, spread evenly over images."""

    num_questions: int
    num_images: int


FULL_TRAIN = SyntheticSize(FULL_TRAIN_QUESTIONS, FULL_TRAIN_IMAGES)
FULL_VAL = SyntheticSize(FULL_VAL_QUESTIONS, FULL_VAL_IMAGES)


def write_vqav2(root: Path, subset: str, size: SyntheticSize, *, first_image: int = 1) -> tuple[Path, Path]:
    """Write the questions and the annotations file of `subset` (`train2014`, `val2014`) under `root/vqav2`.

    The files have the official keys, question ids (image id x 1000 + running number), ten answers a
    question, and about the official number of bytes a record. They are streamed: memory stays flat.

    Returns:
        The questions file and the annotations file.
    """
    folder = root / "vqav2"
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    annotations = folder / f"v2_mscoco_{subset}_annotations.json"
    _write_list(questions, {**_INFO, "task_type": "Open-Ended", "data_subtype": subset}, "questions",
                _questions(size, first_image))  # fmt: skip
    _write_list(annotations, {**_INFO, "data_subtype": subset}, "annotations", _annotations(size, first_image))
    return questions, annotations


def write_images(root: Path, names: Iterable[str], *, width: int = 640, height: int = 480) -> None:
    """Write one picture under each path of `names` (relative to `root`), about as costly as a photograph.

    JPEGs are one picture with differing comments, PNGs differ in their first pixels: no two files have the
    same bytes, and the same names in the same order give the same bytes.
    """
    noise = np.random.default_rng(0).normal(scale=14, size=(height, width, 3))
    slope = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    pixels = np.clip(noise + slope, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=85)
    jpeg = buffer.getvalue()
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            pixels[0, 0] = (number % 256, number // 256 % 256, number // 65_536)
            Image.fromarray(pixels).save(path)
        else:
            comment = f"picture {number}".encode()
            path.write_bytes(jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:])


def _write_list(path: Path, header: dict[str, object], name: str, records: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(header)[:-1] + f', "{name}": [')
        file.write(next(records, ""))
        file.writelines(f", {record}" for record in records)
        file.write("]}")


def _ids(size: SyntheticSize, first_image: int) -> Iterator[tuple[int, int, int]]:
    """Yield running number, question id and image id."""
    if size.num_questions > 1000 * size.num_images:
        raise ValueError("more than 1000 questions an image would repeat question ids")
    for number in range(size.num_questions):
        image_id = first_image + number % size.num_images
        yield number, image_id * 1000 + number // size.num_images, image_id


def _questions(size: SyntheticSize, first_image: int) -> Iterator[str]:
    texts = [json.dumps(_KINDS[n % len(_KINDS)][2].format(noun)) for n, noun in enumerate(_NOUNS)]
    for number, question_id, image_id in _ids(size, first_image):
        yield f'{{"image_id": {image_id}, "question": {texts[number % len(texts)]}, "question_id": {question_id}}}'


def _annotations(size: SyntheticSize, first_image: int) -> Iterator[str]:
    bodies = []  # one for every kind and every way its answers are spread: the rest of a record is ids
    for question_type, answer_type, _, words in _KINDS:
        for shift in range(len(words)):
            spoken = [words[(shift + (position * position) // 7) % len(words)] for position in range(NUM_ANSWERS)]
            answers = [
                {"answer": word, "answer_confidence": "yes" if position % 3 else "maybe", "answer_id": position + 1}
                for position, word in enumerate(spoken)
            ]
            record = {
                "question_type": question_type,
                "multiple_choice_answer": max(spoken, key=spoken.count),
                "answers": answers,
                "answer_type": answer_type,
            }
            bodies.append(json.dumps(record)[:-1])
    per_kind = len(bodies) // len(_KINDS)
    for number, question_id, image_id in _ids(size, first_image):
        body = bodies[number % len(_KINDS) * per_kind + number // len(_KINDS) % per_kind]
        yield f'{body}, "image_id": {image_id}, "question_id": {question_id}}}'
