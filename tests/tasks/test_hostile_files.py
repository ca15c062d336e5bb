"""Whatever stands in an annotation file, a draw ends in samples or in one InputError that names the file."""

from __future__ import annotations

import copy
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.support.synthetic import SyntheticSize, write_images, write_vqav2
from pipeline import tasks
from pipeline.core.errors import InputError
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks.seed_bench import CLOSING
from tests.tasks.conftest import png

ODD = [None, True, -1, 2**70, 1.5, float("nan"), "", "x", "../x", "\0", "\ud800", "é\n", [], {}, [None], [{}], {"a": 1},
       "a" * 5000, "[1", "['a']", "<image 9>", "yes"]  # fmt: skip


def places(value, path=()):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def spoilt(value, pick: random.Random):
    """Return `value` with one to three of its parts replaced, removed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(pick.randint(1, 3)):
        *way, last = pick.choice(list(places(value)) or [(None,)])
        node = value
        for key in way:
            node = node[key]
        act = pick.choice(("replace", "replace", "remove", "repeat"))
        if last is None:
            return pick.choice(ODD)
        if act == "replace":
            node[last] = copy.deepcopy(pick.choice(ODD))
        elif act == "remove":
            del node[last]
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[last]))
    return value


def damaged(data: bytes, pick: random.Random) -> bytes:
    at = pick.randrange(len(data) + 1)
    return pick.choice((data, data, data, data[:at], data[:at] + b"\xff" + data[at + 1 :], b"\xef\xbb\xbf" + data, b""))


@pytest.fixture
def vqa(tmp_path):
    for subset, first in (("train2014", 1), ("val2014", 101)):
        write_vqav2(tmp_path, subset, SyntheticSize(num_questions=6, num_images=6), first_image=first)
        names = [f"COCO_{subset}_{first + i:012d}.jpg" for i in range(6)]
        write_images(tmp_path, [f"images/{subset}/{name}" for name in names], width=8, height=8)
        images = [{"id": first + i, "file_name": name} for i, name in enumerate(names)]
        notes = [{"image_id": first + i, "id": 1, "caption": "A dog. "} for i in range(6) for _ in range(2)]
        (tmp_path / f"captions_{subset}.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return tmp_path


def check(root, name: str) -> None:
    """Draw; anything but a manifest or an InputError fails the test."""
    try:
        drawn = draw_manifest(tasks.get(name), root, seed=0, num_train=2, num_selection=1, num_evaluation=2)
        drawn.save(root / "manifest.json")
        drawn.verify_images()
    except InputError as error:
        str(error).encode()


FILES = [
    ("vqav2", "vqa", "vqav2/v2_OpenEnded_mscoco_train2014_questions.json"),
    ("vqav2", "vqa", "vqav2/v2_mscoco_val2014_annotations.json"),
    ("coco", "vqa", "captions_train2014.json"),
    ("flickr30k", "flickr", "flickr30k/dataset_flickr30k.json"),
    ("seed-bench", "seed_bench", "seed_bench/SEED-Bench.json"),
]


@pytest.mark.parametrize(("name", "made", "file"), FILES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_json(request, name, made, file, seed):
    root, pick = request.getfixturevalue(made), random.Random(seed)
    path = root / file
    whole = path.read_bytes()
    try:
        path.write_bytes(damaged(json.dumps(spoilt(json.loads(whole), pick)).encode(), pick))
        check(root, name)
    finally:
        path.write_bytes(whole)


CELLS = [None, True, 1, 2**40, 1.5, "", "../x", b"\xff", [], ["a"], {"a": 1}, {"bytes": b"x"}, "[1", "<image 9>", "é"]


def mme_rows():
    return [
        {"question_id": f"OCR/{n // 2}.png", "image": {"bytes": png(n // 2), "path": "a"}, "question": "Is it?",
         "answer": ("Yes", "No")[n % 2], "category": "OCR"}
        for n in range(16)
    ]  # fmt: skip


def seed_rows():
    return [
        {"question_id": str(n), "question_type_id": 5, "data_type": "image" if n < 10 else "video", "data_id": f"i{n}",
         "question": "How many?", **{f"choice_{letter}": letter for letter in "abcd"}, "answer": "B",
         "image": [{"bytes": png(n), "path": "a"}] * (1 if n < 10 else 8)}
        for n in range(12)
    ]  # fmt: skip


SHARDS = [("mme", "mme/data/test-00000-of-00001.parquet", mme_rows),
          ("seed-bench", "seed_bench/data/test-00000-of-00001.parquet", seed_rows)]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "rows"), SHARDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_parquet(tmp_path, name, file, rows, seed):
    pick, table = random.Random(seed), rows()
    column, value = pick.choice(list(table[0])), pick.choice(CELLS)
    for row in table if pick.random() < 0.5 else [pick.choice(table)]:
        row[column] = value
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    except pyarrow.ArrowException:  # no column can hold both
        return
    path.write_bytes(damaged(path.read_bytes(), pick))
    check(tmp_path, name)


def test_seed_bench_from_shards_leaves_out_videos(tmp_path):
    path = tmp_path / SHARDS[1][1]
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(seed_rows()), path)
    task = tasks.get("seed-bench")
    samples = list(task.read(tmp_path, "evaluation"))
    assert [sample.sample_id for sample in samples] == [str(n) for n in range(10)]
    assert samples[0].question == "How many?\nA. a\nB. b\nC. c\nD. d\n" + CLOSING
    assert (samples[0].target, samples[0].meta["dimension"]) == ("B", "5")
    manifest = draw_manifest(task, tmp_path, seed=0, num_train=4, num_selection=2)
    assert manifest.sizes == {"train": 4, "selection": 2, "evaluation": 4}
    assert len({sample.images[0].sha256 for part in manifest.splits.values() for sample in part}) == 10


def test_every_broken_image_is_listed_at_once(seed_bench):  # noqa: F811
    folder = seed_bench / "seed_bench" / "SEED-Bench-image"
    (folder / "1454426_3").write_bytes(png(3)[:40])
    (folder / "1454426_4").unlink()
    (folder / "1454426_5").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        draw_manifest(tasks.get("seed-bench"), seed_bench, seed=0, num_train=10, num_selection=5)
    message = str(caught.value)
    assert "3 images are missing or cannot be read" in message
    assert all(f"1454426_{n}: " in message for n in (3, 4, 5))
