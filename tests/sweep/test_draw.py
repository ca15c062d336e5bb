"""The draw: same everywhere, disjoint by image, nested by size; and every way in which it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support.synthetic import SyntheticSize, write_images, write_vqav2
from pipeline import tasks
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest
from pipeline.sweep.draw import draw_manifest

PROJECT = Path(__file__).resolve().parents[2]
VQA = tasks.get("mini-vqa")  # its pictures are PNG, and small here
SEED = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A data root with 300 training questions on 60 images and 40 evaluation questions on 20."""
    root = tmp_path_factory.mktemp("data")
    for subset, size, first in (
        ("train2014", SyntheticSize(300, 60), 1),
        ("val2014", SyntheticSize(40, 20), 1000),
    ):
        write_vqav2(root, subset, size, first_image=first)
        names = (f"images/{subset}/COCO_{subset}_{first + n:012d}.png" for n in range(size.num_images))
        write_images(root, names, width=9 if first == 1 else 8, height=8)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil: files are linked, and replaced rather than changed."""
    for path in whole.rglob("*"):
        target = tmp_path / path.relative_to(whole)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.link(path, target)
    return tmp_path


def replaced_by(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def take(root: Path, train: int = 40, selection: int = 20, evaluation: int | None = None, **more) -> Manifest:
    return draw_manifest(
        VQA, root, seed=SEED, num_train=train, num_selection=selection, num_evaluation=evaluation, **more
    )


def ids(manifest: Manifest, split: str) -> list:
    return [sample.sample_id for sample in manifest.splits[split]]


def test_sizes_and_sources_are_as_asked(whole):
    manifest = take(whole)
    assert manifest.sizes == {"train": 40, "selection": 20, "evaluation": 40}
    assert [source.path for source in manifest.sources] == sorted(
        path.relative_to(whole).as_posix() for path in (whole / "vqav2").iterdir()
    )
    for source in manifest.sources:
        assert source.bytes == (whole / source.path).stat().st_size
    for samples in manifest.splits.values():
        assert all(len(sample.images[0].sha256) == 64 for sample in samples)
    manifest.verify_images()


@pytest.mark.parametrize("sizes", [(40, 20), (150, 60), (200, 30), (30, 150)])
def test_no_image_is_in_two_splits(whole, sizes):
    manifest = take(whole, *sizes)
    for kind in ("path", "sha256"):
        images = {
            split: {getattr(image, kind) for sample in samples for image in sample.images}
            for split, samples in manifest.splits.items()
        }
        assert not images["train"] & images["selection"]
        assert not images["train"] & images["evaluation"]
        assert not images["selection"] & images["evaluation"]


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one(whole):
    larger = take(whole, train=200, selection=20)
    for train, selection in ((1, 20), (40, 20), (100, 20), (100, 60)):
        smaller = take(whole, train=train, selection=selection)
        assert ids(smaller, "train") == ids(larger, "train")[:train]
    assert ids(take(whole, train=10), "selection") == ids(take(whole, train=150), "selection")
    assert ids(take(whole, evaluation=15), "evaluation") == ids(take(whole), "evaluation")[:15]


def test_another_seed_draws_others(whole):
    other = draw_manifest(VQA, whole, seed=SEED + 1, num_train=40, num_selection=20)
    assert set(ids(other, "train")) != set(ids(take(whole), "train"))
    assert other.digest != take(whole).digest


def test_the_draw_is_pinned(whole):
    """A change here changes every study's data: bump the manifest's format and say so."""
    assert ids(take(whole), "train")[:6] == [54003, 29000, 49001, 31003, 14000, 29002]


def test_the_draw_does_not_depend_on_the_hash_seed_or_the_process(whole):
    code = (
        "import sys; from pathlib import Path; from pipeline import tasks\n"
        "from pipeline.sweep.draw import draw_manifest\n"
        "m = draw_manifest(tasks.get('mini-vqa'), Path(sys.argv[1]), seed=5, num_train=40, num_selection=20)\n"
        "print(m.digest)"
    )
    digests = {take(whole).digest}
    for hash_seed in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(
            [sys.executable, "-c", code, str(whole)], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_the_order_of_the_official_file_does_not_matter(whole, root):
    path = root / "vqav2" / "v2_OpenEnded_mscoco_train2014_questions.json"
    content = json.loads(path.read_text())
    content["questions"].reverse()
    replaced_by(path, json.dumps(content).encode())
    assert ids(take(root), "train") == ids(take(whole), "train")


def test_an_image_repeated_under_another_name_is_passed_over(whole, root):
    before = take(whole)
    twin = before.splits["train"][3].images[0].path
    held_out = before.splits["evaluation"][0].images[0].path
    replaced_by(root / twin, (root / held_out).read_bytes())
    after = take(root)
    assert twin not in {sample.images[0].path for sample in after.splits["train"]}
    assert after.sizes == before.sizes
    assert before.splits["train"][3].sample_id in {record["sample_id"] for record in after.replaced}
    assert {(record["split"], record["same_image_in"]) for record in after.replaced} == {("train", "evaluation")}
    kept = [sample.sample_id for sample in before.splits["train"] if sample.images[0].path != twin]
    assert ids(after, "train")[: len(kept)] == kept


def test_missing_and_broken_images_are_all_in_one_error(whole, root):
    drawn = take(whole)
    paths = list(dict.fromkeys(sample.images[0].path for sample in drawn.splits["train"]))[:3]
    paths.append(drawn.splits["evaluation"][0].images[0].path)
    (root / paths[0]).unlink()
    replaced_by(root / paths[1], (whole / paths[1]).read_bytes()[:60])
    replaced_by(root / paths[2], b"")
    replaced_by(root / paths[3], b"no picture")
    with pytest.raises(InputError) as caught:
        take(root)
    text = str(caught.value)
    assert "4 images are missing or cannot be read" in text
    assert all(path in text for path in paths)
    assert "does not exist" in text and "is empty" in text and "no image of a known format" in text


def test_too_few_samples_says_what_there_is(whole):
    with pytest.raises(
        InputError, match="301 train samples were asked for, 300 are available .300 samples on 60 images"
    ):
        take(whole, train=301)
    with pytest.raises(InputError, match="1 selection samples were asked for, 0 are available.*train takes 300"):
        take(whole, train=300, selection=1)
    with pytest.raises(InputError, match="Lower num_evaluation to 40 or less"):
        take(whole, evaluation=41)


@pytest.mark.parametrize("size", [-1, 2.5, True, "10"])
def test_a_size_that_is_no_number_of_samples_is_refused(whole, size):
    with pytest.raises(InputError, match="num_evaluation is .*must be a whole number"):
        take(whole, evaluation=size)


def test_an_empty_draw_and_an_empty_split_are_refused(root):
    with pytest.raises(InputError, match="all 0"):
        take(root, 0, 0, 0)
    for kind, key in (("v2_OpenEnded_mscoco_{}_questions", "questions"), ("v2_mscoco_{}_annotations", "annotations")):
        path = root / "vqav2" / f"{kind.format('val2014')}.json"
        content = json.loads(path.read_text())
        content[key] = []
        replaced_by(path, json.dumps(content).encode())
    with pytest.raises(InputError, match="the evaluation split is empty"):
        take(root)


def test_a_question_without_annotation_stops_the_draw_even_if_not_drawn(whole, root):
    unused = set(range(1000, 61_000)) - set(ids(take(whole), "train")) - set(ids(take(whole), "selection"))
    path = root / "vqav2" / "v2_mscoco_train2014_annotations.json"
    content = json.loads(path.read_text())
    gone = next(a for a in content["annotations"] if a["question_id"] in unused)
    content["annotations"].remove(gone)
    replaced_by(path, json.dumps(content).encode())
    with pytest.raises(InputError, match=f"no annotation: question_id {gone['question_id']}"):
        take(root)


def test_progress_is_reported_on_the_calling_thread(whole):
    seen = []
    take(whole, progress=lambda done, total=None, note="": seen.append((note, done, total)))
    assert any(what.startswith("checking the train images") and done == total for what, done, total in seen)
    assert any("answers" in what for what, _, _ in seen)


@pytest.mark.parametrize(("name", "train", "selection", "evaluation"), [
    ("vqav2", 60, 15, 25), ("okvqa", 30, 8, 54), ("coco", 14, 4, 63),
])  # fmt: skip
def test_official_sample_files(name, train, selection, evaluation, tmp_path, shared_data):
    task = tasks.get(name)
    manifest = draw_manifest(task, shared_data, seed=1, num_train=train, num_selection=selection)
    assert manifest.sizes == {"train": train, "selection": selection, "evaluation": evaluation}
    manifest.save(tmp_path / "manifest.json")
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert loaded.digest == manifest.digest
    for sample in loaded.splits["evaluation"]:
        assert (loaded.image_root / sample.images[0].path).is_file()
        assert sample.target and len(sample.references) >= 5
