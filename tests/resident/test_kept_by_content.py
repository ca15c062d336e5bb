"""What is computed once is found again by what it was computed from, never by a name that something else may have."""

from __future__ import annotations

import io
import os
import random
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from pipeline.core.errors import InputError
from pipeline.core.files import file_digest
from pipeline.data.image_files import check_images, sizes
from pipeline.data.manifest import Manifest
from pipeline.data.parquet import _column_of_group, cell_name
from pipeline.data.sample import ImageRef, Sample
from pipeline.prompts.prompt import encode_all, render
from pipeline.resident.visual_tokens import DiskStore, VisualTokens
from pipeline.tasks import tasks
from pipeline.train.workbench import Workbench
from tests.tasks.conftest import png


@pytest.fixture(scope="module")
def resident(trial, tmp_path_factory):
    return Workbench("cpu").resident(trial("hificl", tmp_path_factory.mktemp("runs")))


def asked(resident, manifest, sample, *, answer=False):
    (prompt,) = resident.alone(manifest, [sample], answer=answer)
    return resident.loaded.tokenizer.decode(prompt.input_ids).replace(" ", "")


def test_a_prompt_is_its_samples_and_not_its_ids(resident, small_world):
    """Own data may count its training and its evaluation samples from 1, and a sample may be given another answer."""
    manifest = Manifest.load(small_world / "mini-vqa" / "manifest.json")
    first, second = manifest.splits["train"][0], manifest.splits["evaluation"][0]
    namesake = replace(second, sample_id=first.sample_id)
    assert first.question != namesake.question
    for sample in (first, namesake, first):
        assert sample.question.replace(" ", "") in asked(resident, manifest, sample)
    other = replace(first, target=next(s.target for s in manifest.splits["train"] if s.target != first.target))
    assert other.target in asked(resident, manifest, other, answer=True)
    assert first.target in asked(resident, manifest, first, answer=True)
    alone = resident.alone(manifest, [first, namesake, first], answer=False)
    assert alone[0] is alone[2] and alone[0].images == first.images and alone[1].images == second.images


def test_a_picture_in_anothers_place_has_its_own_size_and_tokens(tiny, tmp_path):
    """A served model's client may overwrite a file between two questions."""
    loaded = tiny("qwen3-vl-8b")
    visual = VisualTokens(loaded)
    place, found = tmp_path / "photo.png", []
    for number, shape in enumerate([(64, 64), (200, 64)]):
        place.write_bytes(png(number, shape))
        sample = Sample("vqav2", 0, (ImageRef(str(place)),), "What?", "", ())
        (prompt,) = encode_all(loaded, [render(tasks.get("vqav2").template, loaded.backbone, sample)])
        (tokens,) = visual.get(list(prompt.images))
        assert prompt.input_ids.count(loaded.image_token_id) == tokens[..., 0].numel()
        found.append(tokens)
    assert found[0].shape != found[1].shape


def test_nothing_is_kept_under_the_digest_of_another_picture(tiny, tmp_path):
    loaded = tiny("qwen3-vl-8b")
    (tmp_path / "a.png").write_bytes(png(1, (64, 64)))
    drawn = ImageRef("a.png", file_digest(tmp_path / "a.png"))
    (tmp_path / "a.png").write_bytes(png(2, (200, 64)))
    visual = VisualTokens(loaded, tmp_path / "cache")
    for ask in (lambda: visual.get([drawn], tmp_path), lambda: sizes([drawn], tmp_path)[0]):
        with pytest.raises(InputError, match=r"a\.png: its bytes changed since the draw .* Draw the samples again"):
            ask()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    (tmp_path / "a.png").write_bytes(png(1, (64, 64)))
    assert len(visual.get([drawn], tmp_path)) == 1


def test_a_shard_in_anothers_place_is_read_again(tmp_path):
    """Copied with the old one's time, as `cp -p` and `rsync -t` do, and as large."""
    shard, other = tmp_path / "test.parquet", tmp_path / "other.parquet"
    for path, shape in ((shard, (40, 20)), (other, (20, 40))):
        picture = io.BytesIO()
        Image.new("RGB", shape).save(picture, "BMP")
        rows = [{"image": {"bytes": picture.getvalue(), "path": None}}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    place = tmp_path / cell_name("test.parquet", 0, "image")
    assert sizes([place])[0] == (20, 40)
    before = shard.stat()
    content = other.read_bytes()
    assert len(content) == before.st_size
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_mtime_ns == before.st_mtime_ns
    assert sizes([place])[0] == (40, 20)


def test_a_shards_row_groups_are_read_one_after_another_however_their_rows_are_asked_for(tmp_path):
    rows = [{"image": {"bytes": png(n, (10 + n, 8)), "path": None}} for n in range(120)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=10)
    order = random.Random(0).sample(range(120), 120)
    places = [tmp_path / cell_name("t.parquet", row, "image") for row in order]
    before = _column_of_group.cache_info().misses
    assert sizes(places) == [(8, 10 + row) for row in order]
    assert [one.path for one in check_images(places)] == places
    # twice twelve groups, and a few again for a thread that was late; a read a row would be some 160
    assert _column_of_group.cache_info().misses - before <= 48


def test_a_folder_may_be_called_like_a_shard(tmp_path):
    folder = tmp_path / "a.parquet#1"
    folder.mkdir()
    (folder / "x.png").write_bytes(png(3, (12, 9)))
    assert sizes([folder / "x.png"])[0] == (9, 12)


def test_an_entry_that_may_not_be_touched_is_as_good(tmp_path, monkeypatch):
    """A cache on a read-only disk, or another user's."""
    store = DiskStore(tmp_path, limit=1 << 20)
    store.write("ab", torch.ones(3))

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pipeline.resident.visual_tokens.os.utime", refused)
    found = store.read("ab")
    assert found is not None and torch.equal(found, torch.ones(3)) and store.path("ab").exists()
