"""Karpathy's split files: COCO's images and captions divided anew, and Flickr30k."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from pipeline import tasks
from pipeline.core.errors import InputError
from pipeline.sweep.draw import draw_manifest
from tests.tasks.conftest import failure

PARTS = ("train", "restval", "val", "test", "train", "restval", "val", "test", "train")


def record(number: int, part: str) -> dict:
    subset = "train2014" if part == "train" else "val2014"
    sentences = [{"raw": f"A dog {number}\n on {n}. ", "tokens": [], "imgid": 0, "sentid": n} for n in range(5)]
    return {"filepath": subset, "filename": f"COCO_{subset}_{number:012d}.jpg", "cocoid": number, "split": part,
            "imgid": 0, "sentids": [], "sentences": sentences}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    records = [record(number, part) for number, part in enumerate(PARTS, start=1)]
    for one in records:
        path = tmp_path / "images" / one["filepath"] / one["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (one["cocoid"], 0, 0)).save(path, format="PNG")
    (tmp_path / "coco").mkdir()
    write(tmp_path, records)
    return tmp_path


def write(root, records, **header):
    (root / "coco" / "dataset_coco.json").write_text(json.dumps({"images": records, "dataset": "coco", **header}))


@pytest.mark.parametrize(
    ("splits", "train", "evaluation"), [("karpathy", [1, 2, 5, 6, 9], [4, 8]), ("karpathy-val", [1, 5, 9], [3, 7])]
)
def test_the_parts_and_where_their_images_lie(root, splits, train, evaluation):
    task = tasks.get("coco").with_splits(splits)
    assert [sample.sample_id for sample in task.read(root, "train")] == train
    found = list(task.read(root, "evaluation"))
    assert [sample.sample_id for sample in found] == evaluation
    assert found[0].target == f"A dog {evaluation[0]} on 0." and len(found[0].references) == 5
    assert all((root / sample.images[0].path).is_file() for sample in task.read(root, "train"))
    assert [entry.sample_id for entry in task.index(root, "evaluation")] == evaluation
    assert [sample.sample_id for sample in task.read(root, "train", only=[9])] == [9]
    manifest = draw_manifest(task, root, seed=0, num_train=2, num_selection=1)
    assert (manifest.task, manifest.sizes) == ("coco", {"train": 2, "selection": 1, "evaluation": 2})
    assert [source.path for source in manifest.sources] == ["coco/dataset_coco.json"]


def test_splits_are_chosen_by_name():
    coco, flickr = tasks.get("coco"), tasks.get("flickr30k")
    assert coco.with_splits("official") is coco and flickr.with_splits("official") is flickr
    assert flickr.with_splits("karpathy").splits == flickr.splits == "karpathy"
    with pytest.raises(InputError, match=r"unknown splits 'karpaty' of coco.*karpathy"):
        coco.with_splits("karpaty")
    with pytest.raises(InputError, match="unknown splits 'karpathy' of vqav2"):
        tasks.get("vqav2").with_splits("karpathy")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda records: records.append(records[0]), "record 9 of 'images': cocoid 1 stands twice"),
        (lambda records: records[3].pop("filepath"), "record 3 of 'images': field 'filepath' is missing"),
        (lambda records: records[3].update(split="tset"), "record 3 of 'images': 'split' is 'tset'.*test"),
        (lambda records: records[3].update(sentences=[]), "record 3 of 'images': the image has no caption"),
        (lambda records: records[3].update(sentences=["a"]), "record 3 of 'images', sentence 0: is a string"),
        (lambda records: records[3].update(filename="../a.jpg"), "no plain file name"),
        (lambda records: records[3].update(filename="a\0.jpg"), "no plain file name"),
        (lambda records: records[3].update(filepath="val2017"), "'val2017' was not found"),
    ],
)
def test_bad_records_are_named(root, change, says):
    records = [record(number, part) for number, part in enumerate(PARTS, start=1)]
    change(records)
    write(root, records)
    with pytest.raises(InputError, match=says):
        list(tasks.get("coco").with_splits("karpathy").read(root, "evaluation"))


def test_another_of_his_files_is_refused(root):
    write(root, [record(1, "test")], dataset="flickr30k")
    with pytest.raises(InputError, match="'dataset' is 'flickr30k', 'coco' is needed"):
        list(tasks.get("coco").with_splits("karpathy").read(root, "evaluation"))


def test_flickr_uses_karpathys_train_and_test(flickr):
    task = tasks.get("flickr30k")
    test = list(task.read(flickr, "evaluation"))
    assert [sample.sample_id for sample in test] == [1_000_092_795 + n for n in range(1, 30, 3)]
    assert test[0].target == "Two guys , view 0" and len(test[0].references) == 5
    manifest = draw_manifest(task, flickr, seed=0, num_train=6, num_selection=3)
    assert manifest.sizes == {"train": 6, "selection": 3, "evaluation": 10}
    assert (manifest.image_root / manifest.splits["train"][0].images[0].path).is_file()


def test_flickr_errors_are_named(flickr):
    path = flickr / "flickr30k" / "dataset_flickr30k.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "dataset": "flickr8k"}))
    assert "'dataset' is 'flickr8k'" in failure(flickr, "flickr30k")
    content["images"] = [record for record in content["images"] if record["split"] != "train"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="the train split is empty"):
        draw_manifest(tasks.get("flickr30k"), flickr, seed=0, num_train=1, num_selection=0)
    content["images"][0]["filename"] = "../x.jpg"
    path.write_text(json.dumps(content))
    assert "no plain file name" in failure(flickr, "flickr30k")


def test_the_official_sample(shared_data):
    path = shared_data / "coco" / "dataset_coco.json"
    if not path.is_file():
        pytest.skip("no sample data")
    parts = {"karpathy": (69, 3), "karpathy-val": (21, 12)}
    for splits, counts in parts.items():
        task = tasks.get("coco").with_splits(splits)
        assert tuple(len(list(task.read(shared_data, split))) for split in ("train", "evaluation")) == counts
