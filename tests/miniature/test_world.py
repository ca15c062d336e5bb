"""The world's files: official shapes, the same bytes for the same seed, words that scoring leaves alone."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import InputError
from pipeline.miniature.lexicon import (
    ATTRIBUTES,
    COUNT,
    DOT,
    FRAME,
    GROUND,
    NUM_DIALECTS,
    NUM_VALUES,
    SIDE,
    TEXTURE,
    TOPIC_VALUES,
    draw_convention,
    draw_signed,
    signs,
    style_words,
    value_words,
)
from pipeline.miniature.render import draw_attributes, png_bytes, render_images
from pipeline.miniature.world import object_synonyms, write_world
from pipeline.scores.vqa import vqa_accuracy
from pipeline.tasks import tasks

# Digest of all files of the world below. A change means other data for every user: be sure that you want it.
DIGEST = "a35f220c34c55fda7360ba9a1ab8774112fc127e3e390c0e93e5448995cd17cc"
DIGEST_2 = "9091074e0b4e2942631041f278bfa940f39643e170c0b6d12c4ff5dd7d029917"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=5, num_train_images=12, num_val_images=9)
    return folder


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def test_bytes_are_those_of_every_machine(world: Path) -> None:
    assert digest(world) == DIGEST


def test_the_second_world_is_harder_to_see_and_to_learn(world: Path, tmp_path: Path) -> None:
    written = write_world(tmp_path, number=2, seed=5, num_train_images=12, num_val_images=9)
    assert digest(tmp_path) == DIGEST_2
    assert written["world"] == 2 and written["difficulty"] == 0.6
    name = "train2014/COCO_train2014_000000000001.png"
    first, second = (np.asarray(Image.open(folder / name)).astype(int) for folder in (world, tmp_path))
    flat = [np.abs(np.diff(image[:2], axis=1)).mean() for image in (first, second)]  # the frame has one colour
    assert flat[1] > 3 * flat[0]
    about = json.loads((tmp_path / "annotations/captions_val2014.json").read_text())["info"]
    assert about["version"] == "2.0"
    with pytest.raises(InputError, match="no world 4.*1, 2, 3"):
        write_world(tmp_path, number=4)


def test_in_the_third_world_the_ground_tells_which_of_two_groups_speaks(tmp_path: Path) -> None:
    write_world(tmp_path, number=3, seed=5, num_train_images=200, num_val_images=9, noise=0.0, difficulty=0.0)
    words, size = value_words(), NUM_DIALECTS
    dialects: dict[int, set[int]] = {0: set(), 1: set()}
    captions = json.loads((tmp_path / "annotations/captions_train2014.json").read_text())["annotations"]
    grounds = range(sum(TOPIC_VALUES[:GROUND]) * size, sum(TOPIC_VALUES[: GROUND + 1]) * size)
    for caption in captions:
        said = [words.index(word) for word in caption["caption"].split() if word in words]
        for ground in [(number - grounds[0]) // size for number in said if number in grounds]:
            attributes = np.zeros(len(NUM_VALUES), dtype=int)
            attributes[GROUND] = ground
            dialects[int(signs(attributes))] |= {number % size for number in said}
    assert [len(each) for each in dialects.values()] == [1, 1] and dialects[0] != dialects[1]


@pytest.mark.parametrize("seed", range(6))
def test_two_groups_differ_in_every_word_and_each_speaks_of_its_own_pictures(seed: int) -> None:
    rng = np.random.default_rng(seed)
    signed = draw_signed(rng, redraw=0.5)
    first, second = signed.conventions
    assert all((ours != theirs).all() for ours, theirs in zip(first.dialects, second.dialects, strict=True))
    for values in draw_attributes(20, rng):
        speaks = signed.conventions[int(values[GROUND] >= 3)]
        assert signed.of(values) is speaks and first.of(values) is first
        assert signed.caption(values) == speaks.caption(values) != signed.conventions[speaks is first].caption(values)
        assert signed.answer(values, 0) == speaks.answer(values, 0)


def test_another_seed_gives_other_bytes(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, seed=6, num_train_images=12, num_val_images=9)
    assert digest(tmp_path) != digest(world)


def test_more_training_images_leave_evaluation_alone(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, seed=5, num_train_images=20, num_val_images=9)
    name = "v2_mscoco_val2014_annotations.json"
    assert (tmp_path / name).read_bytes() == (world / name).read_bytes()
    assert digest(tmp_path / "val2014") == digest(world / "val2014")


@pytest.mark.parametrize("name", ["mini-vqa", "mini-okvqa", "mini-coco"])
def test_official_readers_read_it(world: Path, name: str) -> None:
    task = tasks.get(name)
    samples = list(task.read(world, "train"))
    assert len(samples) == 12
    assert len(list(task.read(world, "evaluation"))) == 9
    for sample in samples:
        assert (world / sample.images[0].path).is_file()
        assert len(sample.references) == (5 if sample.question is None else 10)


def test_images_open_as_drawn() -> None:
    rng = np.random.default_rng(0)
    (image,) = render_images(draw_attributes(1, rng), rng)
    with Image.open(io.BytesIO(png_bytes(image))) as opened:
        assert opened.mode == "RGB"
        assert np.array_equal(np.array(opened), image)


def test_instances_name_the_shape_that_captions_name(world: Path) -> None:
    instances = json.loads((world / "annotations/instances_val2014.json").read_text())
    names = {category["id"]: category["name"] for category in instances["categories"]}
    shapes = {entry["image_id"]: names[entry["category_id"]] for entry in instances["annotations"]}
    synonyms = object_synonyms()
    for sample in tasks.get("mini-coco").read(world, "evaluation"):
        for caption in sample.references:
            assert set(caption.split()) & set(synonyms[shapes[int(sample.sample_id)]])


def test_words_are_unique_and_survive_normalisation() -> None:
    words = value_words()
    assert len(set(words)) == len(words)
    assert not set(words) & set(style_words())
    # The second answer differs, so that the official protocol normalises both sides.
    scored = vqa_accuracy(dict(enumerate(words)), {n: [w] * 9 + ["other"] for n, w in enumerate(words)})
    assert scored.overall == 100.0
    for other in (words[1:] + words[:1], [word[:-1] for word in words]):
        wrong = vqa_accuracy(dict(enumerate(other)), {n: [w] * 9 + ["other"] for n, w in enumerate(words)})
        assert wrong.overall == 0.0


def test_annotators_mostly_agree_but_not_always(tmp_path: Path) -> None:
    write_world(tmp_path, num_train_images=1, num_val_images=200)
    agreed = [len(set(sample.references)) == 1 for sample in tasks.get("mini-vqa").read(tmp_path, "evaluation")]
    assert 0.2 < np.mean(agreed) < 0.8


def test_every_value_is_drawn_and_visible() -> None:
    rng = np.random.default_rng(1)
    attributes = draw_attributes(400, rng)
    assert [len(np.unique(column)) for column in attributes.T] == list(NUM_VALUES)
    for topic in range(len(NUM_VALUES)):
        changed = attributes.copy()
        changed[:, topic] = (changed[:, topic] + 1) % NUM_VALUES[topic]
        same, other = (render_images(each, np.random.default_rng(2)) for each in (attributes, changed))
        assert (same != other).any(axis=(1, 2, 3)).mean() > 0.95


def test_redrawn_values_leave_the_topics_dialect() -> None:
    kept = draw_convention(np.random.default_rng(3), redraw=0.0)
    assert all(len(set(each.tolist())) == 1 for each in kept.dialects)
    moved = draw_convention(np.random.default_rng(3), redraw=1.0)
    assert any(len(set(each.tolist())) > 1 for each in moved.dialects)


def test_what_is_seen_decides_what_a_caption_speaks_of_and_the_convention_how() -> None:
    rng = np.random.default_rng(4)
    convention = draw_convention(rng)
    forms = set()
    for values in draw_attributes(200, rng):
        said = {convention.answer(values, topic): attribute.name for topic, attribute in enumerate(ATTRIBUTES)}
        words = convention.caption(values).split()
        form = [said.get(word, word) for word in words]
        named = [ATTRIBUTES[topic].name in form for topic in (COUNT, TEXTURE, GROUND, FRAME, DOT, SIDE)]
        assert named[0] != named[1] and named[2] == named[3] != named[4] == named[5]
        forms.add(" ".join(form))
    assert len(forms) == 4  # two things in either clause, each in one way: no two demonstrations disagree


@pytest.mark.parametrize(("argument", "value"), [("difficulty", 1.5), ("noise", -0.1), ("num_val_images", 0)])
def test_bad_arguments_are_named(tmp_path: Path, argument: str, value: float) -> None:
    with pytest.raises(InputError, match=r"1\.5|-0\.1|0 images"):
        write_world(tmp_path, **{argument: value})  # type: ignore[arg-type]
