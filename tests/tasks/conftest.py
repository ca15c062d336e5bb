"""Small data sets in their official layouts, one fixture each."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline import tasks
from pipeline.errors import InputError
from pipeline.tasks.mme import COGNITION, PERCEPTION


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number % 256, number // 256, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def failure(root: Path, name: str, split: str = "evaluation") -> str:
    with pytest.raises(InputError) as caught:
        list(tasks.get(name).read(root, split))
    return str(caught.value)


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    images = tmp_path / "flickr30k" / "flickr30k-images"
    images.mkdir(parents=True)
    records = []
    for number in range(30):
        name = f"{1_000_092_795 + number}.jpg"
        (images / name).write_bytes(png(number))
        sentences = [{"raw": f"Two guys , view {n} \n", "tokens": [], "imgid": number, "sentid": n} for n in range(5)]
        split = ("train", "test", "val")[number % 3]
        records.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, "sentids": []})
    content = {"images": records, "dataset": "flickr30k"}
    (tmp_path / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def mme(tmp_path: Path) -> Path:
    release = tmp_path / "mme" / "MME_Benchmark_release_version"
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
    return tmp_path


@pytest.fixture
def seed_bench(tmp_path: Path) -> Path:
    images = tmp_path / "seed_bench" / "SEED-Bench-image"
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
    return tmp_path


@pytest.fixture
def mmmu(tmp_path: Path) -> Path:
    folder = tmp_path / "mmmu_pro" / "standard (10 options)"
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
    return tmp_path
