"""Small data sets in their official layouts, one fixture each."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from benchmarks.support.synthetic import SyntheticSize, write_vqav2
from pipeline import tasks
from pipeline.core.errors import InputError
from pipeline.tasks.mme import COGNITION, PERCEPTION


def png(number: int, size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def failure(root: Path, name: str, split: str = "evaluation") -> str:
    with pytest.raises(InputError) as caught:
        list(tasks.get(name).read(root, split))
    return str(caught.value)


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    return make_flickr(tmp_path)


def make_flickr(root: Path) -> Path:
    images = root / "flickr30k" / "flickr30k-images"
    images.mkdir(parents=True)
    records = []
    for number in range(30):
        name = f"{1_000_092_795 + number}.jpg"
        (images / name).write_bytes(png(number))
        sentences = [{"raw": f"Two guys , view {n} \n", "tokens": [], "imgid": number, "sentid": n} for n in range(5)]
        split = ("train", "test", "val")[number % 3]
        records.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, "sentids": []})
    content = {"images": records, "dataset": "flickr30k"}
    (root / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def mme(tmp_path: Path) -> Path:
    return make_mme(tmp_path)


def make_mme(root: Path) -> Path:
    release = root / "mme" / "MME_Benchmark_release_version"
    number = 0
    for subtask in (*PERCEPTION, *COGNITION):
        texts = pictures = release / subtask
        if subtask in {"artwork", "posters"}:
            texts, pictures = release / subtask / "questions_answers_YN", release / subtask / "images"
        texts.mkdir(parents=True)
        pictures.mkdir(exist_ok=True)
        for image in range(4):
            number += 1
            suffix = ".png" if subtask in COGNITION else ".jpg"
            (pictures / f"{image:04d}{suffix}").write_bytes(png(number))
            questions = f"Is it é{image}? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n\n"
            (texts / f"{image:04d}.txt").write_text(questions, encoding="utf-8")
    return root


@pytest.fixture
def seed_bench(tmp_path: Path) -> Path:
    return make_seed_bench(tmp_path)


def make_seed_bench(root: Path) -> Path:
    images = root / "seed_bench" / "SEED-Bench-image"
    images.mkdir(parents=True)
    questions = []
    for number in range(20):
        (images / f"1454426_{number}").write_bytes(png(number))
        questions.append(
            {
                "answer": " B" if number % 2 else "A",
                **{f"choice_{letter}": f"{letter}{number}" for letter in "abcd"},
                "data_id": f"1454426_{number}",
                "data_type": "image",
                "question": "How many towels?",
                "question_id": str(101_669 + number),
                "question_type_id": 5 if number % 2 else 3,
            }
        )
    video = {"data_id": "94328.webm", "data_type": "video", "question_id": "v1738", "question_type_id": 10}
    questions.append({**video, "answer": "C"})
    names = {"Instance Attributes": 3, "Instances Counting": 5}
    (images.parent / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": names}))
    return root


@pytest.fixture
def mmmu(tmp_path: Path) -> Path:
    return make_mmmu(tmp_path)


def make_mmmu(root: Path) -> Path:
    folder = root / "mmmu_pro" / "standard (10 options)"
    folder.mkdir(parents=True)
    empty = {f"image_{n}": None for n in range(1, 8)}
    records = [
        {
            "id": f"test_Biology_{number}",
            "question": "Which <image 2> follows <image 1>?",
            "options": "['90', \"it's\", '<image 2>']",
            "answer": "C",
            "subject": "Biology",
            "topic_difficulty": "Easy",
            **empty,
            "image_1": {"bytes": png(3 * number), "path": "a.png"},
            "image_2": {"bytes": png(3 * number + 1), "path": None},
        }
        for number in range(12)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "test-00000-of-00001.parquet")
    return root


def make_mme_shards(root: Path) -> Path:
    """MME as its Hub copy has it: the picture in both rows of its two questions."""
    folders = make_mme(root / "folders")
    records = [
        {
            "question_id": f"{sample.meta['category']}/{sample.meta['image']}",
            "image": {"bytes": (folders / sample.images[0].path).read_bytes(), "path": None},
            "question": sample.question,
            "answer": sample.target,
            "category": sample.meta["category"],
        }
        for sample in tasks.get("mme").read(folders, "evaluation")
    ]
    (root / "mme" / "data").mkdir(parents=True)
    for shard in range(2):
        table = pyarrow.Table.from_pylist(records[56 * shard : 56 * (shard + 1)])
        pyarrow.parquet.write_table(table, root / f"mme/data/test-{shard:05d}-of-00002-ab.parquet", row_group_size=10)
    return root


def make_seed_bench_shards(root: Path) -> Path:
    """SEED-Bench as its Hub copy has it: a list of pictures a row, eight for a video."""
    release = make_seed_bench(root / "folders") / "seed_bench"
    records = json.loads((release / "SEED-Bench.json").read_text())["questions"]
    rows = [
        {
            **dict.fromkeys([f"choice_{letter}" for letter in "abcd"], "x"),
            "question": "What happens?",
            **record,
            "image": [{"bytes": (release / "SEED-Bench-image" / record["data_id"]).read_bytes(), "path": None}]
            if record["data_type"] == "image"
            else [{"bytes": png(900 + number), "path": None} for number in range(8)],
        }
        for record in records
    ]
    (root / "seed_bench" / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, root / "seed_bench/data/test-00000-of-00001-cd.parquet", row_group_size=7)
    return root


def make_vqav2(root: Path) -> Path:
    for subset, first in (("train2014", 1), ("val2014", 500)):
        write_vqav2(root, subset, SyntheticSize(20, 10), first_image=first)
        write_coco_images(root, subset, first, 10)
    return root


def make_okvqa(root: Path) -> Path:
    """The same records under OK-VQA's names."""
    for path in (make_vqav2(root) / "vqav2").iterdir():
        (root / "okvqa").mkdir(exist_ok=True)
        path.rename(root / "okvqa" / path.name.removeprefix("v2_"))
    return root


def make_coco(root: Path) -> Path:
    folder = root / "coco" / "annotations"
    folder.mkdir(parents=True)
    for subset, first in (("train2014", 1), ("val2014", 500)):
        write_coco_images(root, subset, first, 10)
        content = {
            "images": [{"id": i, "file_name": f"COCO_{subset}_{i:012d}.jpg"} for i in range(first, first + 10)],
            "annotations": [
                {"image_id": i, "id": 5 * i + n, "caption": f"A dog, view {n}."}
                for i in range(first, first + 10)
                for n in range(5)
            ],
        }
        (folder / f"captions_{subset}.json").write_text(json.dumps(content))
    return root


def write_coco_images(root: Path, subset: str, first: int, number: int) -> None:
    (root / "images" / subset).mkdir(parents=True)
    for image in range(first, first + number):
        (root / "images" / subset / f"COCO_{subset}_{image:012d}.jpg").write_bytes(png(image, (30 + image % 7, 40)))


# Every way in which a task's official files can hold questions and pictures: task and what writes it.
LAYOUTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "vqav2": ("vqav2", make_vqav2),
    "okvqa": ("okvqa", make_okvqa),
    "coco": ("coco", make_coco),
    "flickr30k": ("flickr30k", make_flickr),
    "mme, folders": ("mme", make_mme),
    "mme, shards": ("mme", make_mme_shards),
    "seed-bench, folder": ("seed-bench", make_seed_bench),
    "seed-bench, shards": ("seed-bench", make_seed_bench_shards),
    "mmmu-pro": ("mmmu-pro", make_mmmu),
}
