"""All seven data sets with made-up content, in the official formats and of the official sizes.

Sizes: VQAv2 and OK-VQA from visualqa.org and okvqa.allenai.org; COCO 2014 from cocodataset.org; Flickr30k from
Karpathy's file; MME from the release's result templates; SEED-Bench from its paper and Hub card; MMMU-Pro from its Hub
card and the published outputs. Pictures are of two pixels; those of a validation split are one, and of a training split
only those are there that a draw takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet

from benchmarks.support.synthetic import FULL_TRAIN, FULL_VAL, SyntheticSize, write_vqav2
from pipeline.config.load import Subsample
from pipeline.sweep.draw import plan_draw
from pipeline.tasks import IndexEntry

COCO_IMAGES = {"train2014": FULL_TRAIN.num_images, "val2014": FULL_VAL.num_images}
COCO_CAPTIONS = {"train2014": 414_113, "val2014": 202_654}
OKVQA = {"train2014": SyntheticSize(9_009, 8_998), "val2014": SyntheticSize(5_046, 5_033)}
FLICKR30K = {"train": 29_000, "val": 1_014, "test": 1_000}
MME_IMAGES = {
    "existence": 30, "count": 30, "position": 30, "color": 30, "posters": 147, "celebrity": 170, "scene": 200,
    "landmark": 200, "artwork": 200, "OCR": 20, "commonsense_reasoning": 70, "numerical_calculation": 20,
    "text_translation": 20, "code_reasoning": 20,
}  # fmt: skip
SEED_BENCH = {"image": 14_233, "video": 3_757}
MMMU_PRO_IMAGES = {1: 1_594, 2: 69, 3: 11, 4: 35, 5: 20, 7: 1}  # questions by number of different images
MMMU_PRO_OPTIONS = {10: 1_214, 9: 221, 4: 124, 3: 41, 5: 41, 8: 31, 2: 28, 6: 16, 7: 12, 1: 1, 12: 1}

# Questions that the draw chooses from; SEED-Bench's on videos are left out.
OFFICIAL: Mapping[str, int] = {
    "vqav2": FULL_VAL.num_questions,
    "okvqa": OKVQA["val2014"].num_questions,
    "coco": COCO_IMAGES["val2014"],
    "flickr30k": FLICKR30K["test"],
    "mme": 2 * sum(MME_IMAGES.values()),
    "seed-bench": SEED_BENCH["image"],
    "mmmu-pro": sum(MMMU_PRO_IMAGES.values()),
}
_OFF_TRAIN = 600_000  # COCO's ids of the two splits differ; ours of the validation split begin here


def picture(number: int) -> bytes:
    """A picture that no other number has."""
    return b"P6 2 1 255\n" + number.to_bytes(6, "big")


def write(root: Path, sizes: Subsample) -> None:
    """Write everything below `root` that draws of these sizes and this seed read."""
    for subset, first in (("train2014", 1), ("val2014", _OFF_TRAIN)):
        write_vqav2(root, subset, FULL_TRAIN if subset == "train2014" else FULL_VAL, first_image=first)
        okvqa = write_vqav2(root / "made", subset, OKVQA[subset], first_image=first)
        (root / "okvqa").mkdir(exist_ok=True)
        for path in okvqa:  # beside raw answers, which nothing reads, its files differ in their names alone
            path.rename(root / "okvqa" / path.name.removeprefix("v2_"))
        _coco_captions(root, subset, first)
    for folder in ("images/train2014", "images/val2014"):
        (root / folder).mkdir(parents=True)
    (root / "one.ppm").write_bytes(picture(0))
    for number in range(_OFF_TRAIN, _OFF_TRAIN + COCO_IMAGES["val2014"]):
        (root / f"images/val2014/COCO_val2014_{number:012d}.jpg").symlink_to(root / "one.ppm")
    for task, size in (("vqav2", FULL_TRAIN), ("okvqa", OKVQA["train2014"])):
        ids = ((image * 1000 + n // size.num_images, image) for n in range(size.num_questions)
               for image in [1 + n % size.num_images])  # fmt: skip
        _drawn(root, sizes, task, ((one, f"images/train2014/COCO_train2014_{image:012d}.jpg") for one, image in ids))
    numbers = range(1, COCO_IMAGES["train2014"] + 1)
    _drawn(root, sizes, "coco", ((n, f"images/train2014/COCO_train2014_{n:012d}.jpg") for n in numbers))
    _flickr30k(root, sizes)
    _mme(root / "mme" / "MME_Benchmark_release_version")
    _seed_bench(root / "seed_bench")
    _mmmu_pro(root / "mmmu_pro" / "standard (10 options)")


def _drawn(root: Path, sizes: Subsample, task: str, train: Iterable[tuple[int, str]]) -> None:
    """Write the pictures that the draw takes from a training split, all distinct; given its ids and their places."""
    given, entries = sizes.of(task), [IndexEntry(one, (path,)) for one, path in train]
    held = [IndexEntry(0, ("another",))]
    indexed = SimpleNamespace(
        name=task,
        one_pool=False,
        pools=lambda root: ("evaluation", "train"),
        index=lambda root, split: entries if split == "train" else held,
    )
    chosen = plan_draw(
        indexed, root, seed=given.seed, num_train=given.num_train, num_selection=given.num_selection, num_evaluation=0
    )
    for candidates in chosen[1:]:
        for entry in candidates.entries[: candidates.wanted]:
            place = root / entry.images[0]
            place.write_bytes(picture(int(place.stem.rsplit("_", 1)[-1])))


def _coco_captions(root: Path, subset: str, first: int) -> None:
    images, captions = COCO_IMAGES[subset], COCO_CAPTIONS[subset]
    folder = root / "coco" / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"captions_{subset}.json").open("w", encoding="utf-8") as file:
        file.write('{"info": {"year": 2014}, "licenses": [{"id": 3, "name": "none", "url": ""}], "images": [')
        file.write(", ".join(
            f'{{"license": 3, "file_name": "COCO_{subset}_{number:012d}.jpg", "coco_url": "", "height": 1, "width": 2, '
            f'"date_captured": "2013-11-14 11:18:45", "flickr_url": "", "id": {number}}}'
            for number in range(first, first + images)
        ))  # fmt: skip
        file.write('], "annotations": [')
        file.write(", ".join(  # five an image, the sixth ones at the beginning
            f'{{"image_id": {first + n % images}, "id": {n + 1}, "caption": "A café with view {n // images} of {n}. "}}'
            for n in range(captions)
        ))  # fmt: skip
        file.write("]}")


def _flickr30k(root: Path, sizes: Subsample) -> None:
    splits = [split for split, number in FLICKR30K.items() for _ in range(number)]
    names = [f"{1_000_092_795 + n}.jpg" for n in range(len(splits))]
    images = [
        {
            "sentids": list(range(5 * n, 5 * n + 5)), "imgid": n, "split": split, "filename": name,
            "sentences": [
                {"tokens": ["guys", str(n)], "raw": f"Two guys , view {i} of {n} .", "imgid": n, "sentid": 5 * n + i}
                for i in range(5)
            ],
        }
        for n, (split, name) in enumerate(zip(splits, names, strict=True))
    ]  # fmt: skip
    folder = root / "flickr30k" / "flickr30k-images"
    folder.mkdir(parents=True)
    (root / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    train = ((int(name[:-4]), f"flickr30k/flickr30k-images/{name}") for name in names[: FLICKR30K["train"]])
    _drawn(root, sizes, "flickr30k", train)
    for name in names[-FLICKR30K["test"] :]:
        (folder / name).symlink_to(root / "one.ppm")


def _mme(release: Path) -> None:
    numbers = count(1)
    for subtask, images in MME_IMAGES.items():
        texts = pictures = release / subtask
        if subtask in {"artwork", "celebrity", "landmark", "posters", "scene"}:
            texts, pictures = release / subtask / "questions_answers_YN", release / subtask / "images"
        texts.mkdir(parents=True)
        pictures.mkdir(exist_ok=True)
        for image in range(images):
            (pictures / f"{image:04d}.jpg").write_bytes(picture(next(numbers)))
            (texts / f"{image:04d}.txt").write_text(
                f"Is it {image}? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
            )


def _seed_bench(release: Path) -> None:
    (release / "SEED-Bench-image").mkdir(parents=True)
    questions = []
    for n in range(sum(SEED_BENCH.values())):
        kind = "image" if n < SEED_BENCH["image"] else "video"
        name = f"1454426_{n}" if kind == "image" else f"{n}.webm"
        questions.append(
            {
                "answer": "ABCD"[n % 4], **{f"choice_{letter}": f"{letter}{n}" for letter in "abcd"}, "data_id": name,
                "data_type": kind, "question": f"How many towels are in image {n}?",
                "question_id": str(101_669 + n) if kind == "image" else f"v{n}",
                "question_type_id": 1 + n % 9 if kind == "image" else 10 + n % 3,
            }
        )  # fmt: skip
        if kind == "image":
            (release / "SEED-Bench-image" / name).write_bytes(picture(n))
    types = {f"Dimension {number}": number for number in range(1, 13)}
    (release / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": types}))


def _mmmu_pro(folder: Path) -> None:
    """Two shards; the markers stand in the question, in the order of the columns."""
    options = [number for number, questions in MMMU_PRO_OPTIONS.items() for _ in range(questions)]
    images = [number for number, questions in MMMU_PRO_IMAGES.items() for _ in range(questions)]
    records = [
        {
            "id": f"test_Biology_{n}", "question": f"Which of {' '.join(f'<image {i}>' for i in range(1, shown + 1))}?",
            "options": str([f"option {i}" for i in range(given)]), "explanation": "?",
            **{
                f"image_{i}": {"bytes": picture(10 * n + i), "path": None} if i <= shown else None for i in range(1, 8)
            },
            "img_type": "['Diagrams']", "answer": "A", "topic_difficulty": "Medium", "subject": f"Subject_{n % 30}",
        }
        for n, (given, shown) in enumerate(zip(options, images, strict=True))
    ]  # fmt: skip
    folder.mkdir(parents=True)
    empty = pyarrow.Table.from_pylist([{**records[-1], "image_6": records[-1]["image_1"]}]).schema
    for shard, rows in enumerate((records[:865], records[865:])):
        table = pyarrow.Table.from_pylist(rows, schema=empty)
        pyarrow.parquet.write_table(table, folder / f"test-{shard:05d}-of-00002.parquet", row_group_size=100)
