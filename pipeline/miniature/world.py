"""Write the miniature's world as data sets in the official files' shapes.

One folder holds three data sets over the same images: `mini-vqa` (VQAv2's files), `mini-okvqa` (OK-VQA's
files) and `mini-coco` (COCO's captions and instances). They share one down-stream convention (see
`lexicon`): a dialect per topic that pre-training rarely met together, with a fraction `difficulty` of the
values drawn again. Ten annotators answer, and not all of them follow it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.errors import InputError
from pipeline.miniature.lexicon import (
    ATTRIBUTES,
    COUNT,
    DIALECT_SUFFIXES,
    QUESTIONS,
    RELATIONS,
    SHAPE,
    TOPICS,
    Annotators,
    Crowd,
    word,
)
from pipeline.miniature.render import IMAGE_SIZE, NOISE, draw_attributes, png_bytes, render_images

# The image of id 7 in split train2014 is train2014/COCO_train2014_000000000007.png: as COCO, but lossless.
IMAGE_NAME = "COCO_{subset}_{image_id:012d}.png"
SUBSETS = ("train2014", "val2014")
_FIRST_VAL_ID = 500_001
_OKVQA_TYPES = {"one": "Food", "two": "Home", "three": "Maker", "four": "Season", "other": "Other"}
_LICENSE = {"url": "", "name": "made by the program, free of rights"}


@dataclass(frozen=True)
class World:
    """How hard it is to see in a world, and to learn how its annotators speak.

    Attributes:
        version: as its files name it.
        pixel_noise: pixels are moved by at most this much, of 255.
        difficulty: fraction of the values whose word leaves its topic's dialect, unless `write_world` is told another.
        signed: whether two groups of annotators share the pictures, and each picture shows whose it is.
    """

    version: str
    pixel_noise: int
    difficulty: float
    signed: bool = False


WORLDS = {1: World("1.1", NOISE, 0.2), 2: World("2.0", 100, 0.6), 3: World("3.0", NOISE, 0.2, signed=True)}


def world_of(number: int) -> World:
    """Return the world of a number.

    Raises:
        InputError: there is none.
    """
    if number not in WORLDS:
        raise InputError(f"there is no world {number}", way_out=f"There are {', '.join(map(str, WORLDS))}")
    return WORLDS[number]


def write_world(
    folder: Path,
    *,
    number: int = 1,
    seed: int = 0,
    num_train_images: int = 2500,
    num_val_images: int = 2500,
    difficulty: float | None = None,
    noise: float = 0.05,
) -> dict[str, object]:
    """Write images and annotation files; the same arguments give the same bytes on every machine.

    Args:
        folder: made if missing; files of the same names are replaced.
        number: which of the worlds.
        seed: of convention, images, questions and annotators.
        num_train_images: images of `train2014`, each with one question of either kind and five captions.
        num_val_images: likewise `val2014`.
        difficulty: fraction of the values whose word is drawn again, away from the topic's usual dialect: 0
            is learned from few samples, 1 leaves nothing that one value tells about another. None: the world's.
        noise: probability that an annotator uses another dialect's word.

    Returns:
        what was written: numbers of images, the files' names, the arguments.

    Raises:
        InputError: an argument is out of range.
    """
    world = world_of(number)
    difficulty = world.difficulty if difficulty is None else difficulty
    for name, value in (("difficulty", difficulty), ("noise", noise)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}", way_out="A fraction from 0 to 1 is needed")
    sizes = dict(zip(SUBSETS, (num_train_images, num_val_images), strict=True))
    for subset, size in sizes.items():
        if not 1 <= size < _FIRST_VAL_ID:
            raise InputError(f"{size} images for {subset}", way_out=f"From 1 to {_FIRST_VAL_ID - 1:,} are possible")
    # Each part has its own stream, so that more images of one split change nothing in the other.
    convention_seed, *subset_seeds = np.random.SeedSequence(seed).spawn(1 + len(SUBSETS))
    rng = np.random.default_rng(convention_seed)
    crowd = Crowd.draw(rng, difficulty=difficulty, noise=noise, signed=world.signed)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    for subset, subset_seed, first_id in zip(SUBSETS, subset_seeds, (1, _FIRST_VAL_ID), strict=True):
        image_rng, *text_rngs = (np.random.default_rng(part) for part in subset_seed.spawn(4))
        attributes = draw_attributes(sizes[subset], image_rng)
        image_ids = [first_id + nth for nth in range(sizes[subset])]
        _write_images(folder, subset, image_ids, render_images(attributes, image_rng, world.pixel_noise))
        writers: Sequence[_Writer] = (_vqa_files, _okvqa_files, _coco_files)
        for write, text_rng in zip(writers, text_rngs, strict=True):
            for name, content in write(subset, image_ids, attributes, Annotators(crowd, text_rng)).items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                about = {"info": _info(world)}
                path.write_text(json.dumps(about | content) + "\n", encoding="utf-8")
                written.append(name)
    return {
        "world": number,
        "num_images": sizes,
        "files": sorted(written),
        "seed": seed,
        "difficulty": difficulty,
        "noise": noise,
    }


_Files = dict[str, dict[str, object]]  # content by file name
_Writer = Callable[[str, list[int], np.ndarray, Annotators], _Files]


def _write_images(folder: Path, subset: str, image_ids: Sequence[int], images: np.ndarray) -> None:
    (folder / subset).mkdir(exist_ok=True)
    for image_id, image in zip(image_ids, images, strict=True):
        (folder / subset / IMAGE_NAME.format(subset=subset, image_id=image_id)).write_bytes(png_bytes(image))


def _info(world: World) -> object:
    return {"description": "the miniature world", "version": world.version, "year": 2026, "contributor": "hificl-lab"}


def _wrapper(subset: str) -> dict[str, object]:
    return {"license": _LICENSE, "data_type": "mscoco", "data_subtype": subset}


def _vqa_files(subset: str, image_ids: list[int], attributes: np.ndarray, annotators: Annotators) -> _Files:
    """Questions on what an image shows, in VQAv2's two files."""
    questions, annotations = [], []
    for image_id, values in zip(image_ids, attributes, strict=True):
        topic = annotators.choose(len(ATTRIBUTES))
        answers = annotators.answers(values, topic)
        question_id = image_id * 1000
        questions.append({"image_id": image_id, "question": QUESTIONS[topic], "question_id": question_id})
        annotations.append(
            {
                "question_type": QUESTIONS[topic].rstrip("?").lower(),
                "multiple_choice_answer": max(answers, key=answers.count),
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": nth}
                    for nth, answer in enumerate(answers, start=1)
                ],
                "image_id": image_id,
                "answer_type": "number" if topic == COUNT else "other",
                "question_id": question_id,
            }
        )
    return {
        f"v2_OpenEnded_mscoco_{subset}_questions.json": {
            **_wrapper(subset),
            "task_type": "Open-Ended",
            "questions": questions,
        },
        f"v2_mscoco_{subset}_annotations.json": {**_wrapper(subset), "annotations": annotations},
    }


def _okvqa_files(subset: str, image_ids: list[int], attributes: np.ndarray, annotators: Annotators) -> _Files:
    """Questions on what an image does not show but the world knows, in OK-VQA's two files."""
    questions, annotations = [], []
    for image_id, values in zip(image_ids, attributes, strict=True):
        relation = annotators.choose(len(RELATIONS))
        topic = len(ATTRIBUTES) + relation
        question_id = int(f"{image_id}5")
        questions.append({"image_id": image_id, "question": QUESTIONS[topic], "question_id": question_id})
        annotations.append(
            {
                "image_id": image_id,
                "answer_type": "other",
                "question_type": list(_OKVQA_TYPES)[relation],
                "question_id": question_id,
                "answers": [
                    {"answer_id": nth, "raw_answer": answer, "answer_confidence": "yes", "answer": answer}
                    for nth, answer in enumerate(annotators.answers(values, topic, distinct=5), start=1)
                ],
                "confidence": 3,
            }
        )
    return {
        f"OpenEnded_mscoco_{subset}_questions.json": {
            **_wrapper(subset),
            "task_type": "Open-Ended",
            "questions": questions,
        },
        f"mscoco_{subset}_annotations.json": {
            **_wrapper(subset),
            "question_types": _OKVQA_TYPES,
            "annotations": annotations,
        },
    }


def _coco_files(subset: str, image_ids: list[int], attributes: np.ndarray, annotators: Annotators) -> _Files:
    """Five captions an image, and the object it shows (its shape) as a COCO instance."""
    images, captions, instances = [], [], []
    for image_id, values in zip(image_ids, attributes, strict=True):
        images.append(
            {
                "license": 1,
                "file_name": IMAGE_NAME.format(subset=subset, image_id=image_id),
                "height": IMAGE_SIZE,
                "width": IMAGE_SIZE,
                "id": image_id,
            }
        )
        for nth, caption in enumerate(annotators.captions(values)):
            captions.append({"image_id": image_id, "id": image_id * 10 + nth, "caption": caption})
        instances.append(
            {
                # The whole picture stands for the object's outline: CHAIR asks only which objects are there.
                "segmentation": [[0, 0, IMAGE_SIZE, 0, IMAGE_SIZE, IMAGE_SIZE, 0, IMAGE_SIZE]],
                "area": float(IMAGE_SIZE**2),
                "iscrowd": 0,
                "image_id": image_id,
                "bbox": [0, 0, IMAGE_SIZE, IMAGE_SIZE],
                "category_id": int(values[SHAPE]) + 1,
                "id": image_id * 10,
            }
        )
    common = {"images": images, "licenses": [{"url": "", "id": 1, "name": _LICENSE["name"]}]}
    return {
        f"annotations/captions_{subset}.json": {**common, "annotations": captions},
        f"annotations/instances_{subset}.json": {**common, "categories": _categories(), "annotations": instances},
    }


def _categories() -> list[dict[str, object]]:
    return [{"supercategory": "shape", "id": value + 1, "name": root} for value, root in enumerate(TOPICS[SHAPE].roots)]


def object_synonyms() -> dict[str, list[str]]:
    """Return the words that name each object category, in every dialect: what CHAIR needs to read captions."""
    return {
        root: [word(SHAPE, value, dialect) for dialect in range(len(DIALECT_SUFFIXES))]
        for value, root in enumerate(TOPICS[SHAPE].roots)
    }
