"""The manifest: written whole, read back equal, and any changed byte is named."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.errors import InputError, WorkError
from pipeline.data.image_files import read_image
from pipeline.data.manifest import Manifest, Source
from pipeline.data.sample import ImageRef, Sample


def sample(number: int) -> Sample:
    return Sample(
        task="vqav2",
        sample_id=number,
        images=(ImageRef(f"images/{number}.png", f"{number:064x}"),),
        question=f"Wie groß war Nummer {number}?",
        target="ja",
        references=("ja",) * 10,
        meta={"answer_type": "yes/no", "image_id": number},
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    splits = {"train": tuple(map(sample, range(5))), "selection": (sample(7),), "evaluation": (sample(8), sample(9))}
    return Manifest("vqav2", 3, (Source("vqav2/q.json", "ab" * 32, 12),), splits, tmp_path)


def test_it_comes_back_as_it_was_one_sample_a_line(manifest, tmp_path):
    path = tmp_path / "sub" / "manifest.json"
    manifest.save(path)
    loaded = Manifest.load(path)
    assert loaded == manifest
    text = path.read_text()
    assert sum('"sample_id"' in line for line in text.splitlines()) == 8
    assert all(line.count('"sample_id"') <= 1 for line in text.splitlines())
    assert [entry.name for entry in path.parent.iterdir()] == ["manifest.json"]
    manifest.save(path)
    assert path.read_text() == text


def test_the_digest_is_of_the_contents_and_not_of_the_place(manifest, tmp_path):
    elsewhere = Manifest(manifest.task, manifest.seed, manifest.sources, manifest.splits, Path("elsewhere"))
    assert elsewhere.digest == manifest.digest
    elsewhere.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json").image_root == Path("elsewhere")
    for other in (
        Manifest("okvqa", 3, manifest.sources, manifest.splits, tmp_path),
        Manifest("vqav2", 4, manifest.sources, manifest.splits, tmp_path),
        Manifest("vqav2", 3, (), manifest.splits, tmp_path),
        Manifest("vqav2", 3, manifest.sources, {**manifest.splits, "selection": ()}, tmp_path),
        Manifest("vqav2", 3, manifest.sources, {**manifest.splits, "train": manifest.splits["train"][::-1]}, tmp_path),
    ):
        assert other.digest != manifest.digest


def test_any_changed_byte_is_found(manifest, tmp_path):
    path = tmp_path / "m.json"
    manifest.save(path)
    data = path.read_bytes()
    root = str(tmp_path).encode()
    free = range(data.index(root), data.index(root) + len(root))  # image_root is not sealed
    dice = random.Random(0)
    for at in dice.sample([at for at in range(len(data)) if at not in free and data[at : at + 1].isalnum()], 150):
        changed = bytes([data[at] ^ 1])
        path.write_bytes(data[:at] + changed + data[at + 1 :])
        with pytest.raises(InputError) as caught:
            Manifest.load(path)
        assert str(path) in str(caught.value)


def test_the_changed_sample_is_named_with_its_line(manifest, tmp_path):
    path = tmp_path / "m.json"
    manifest.save(path)
    text = path.read_text().replace("Nummer 8", "Nummer 6")
    path.write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if "Nummer 6" in row)
    with pytest.raises(InputError, match=rf"evaluation\[0\] \(sample 8\) on line {line}"):
        Manifest.load(path)


def test_lost_and_moved_lines_are_found(manifest, tmp_path):
    path = tmp_path / "m.json"
    manifest.save(path)
    lines = path.read_text().splitlines(keepends=True)
    first = next(n for n, row in enumerate(lines) if '"sample_id": 0,' in row)
    path.write_text("".join(lines[:first] + lines[first + 1 :]))
    with pytest.raises(InputError, match="'sizes' says"):
        Manifest.load(path)
    path.write_text("".join([*lines[:first], lines[first + 1], lines[first], *lines[first + 2 :]]))
    with pytest.raises(InputError, match="digest does not match"):
        Manifest.load(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b"[]", "is no manifest"),
        (b'{"splits": {}, "digest": "x", "format": 99}', "has format 99"),
        (b'{"splits": [], "digest": "x", "format": 1}', "must hold lists"),
        (b'{"splits": {"train": [3]}, "digest": "x", "format": 1}', "1 sample"),
        (b'{"splits": {}, "digest": "x", "format": 1}', "a field is missing"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_what_is_no_manifest_is_named(tmp_path, content, says):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(InputError, match=says):
        Manifest.load(tmp_path / "m.json")
    with pytest.raises(InputError, match="cannot be read"):
        Manifest.load(tmp_path / "absent.json")


def test_truncation_anywhere_is_found(manifest, tmp_path):
    path = tmp_path / "m.json"
    manifest.save(path)
    data = path.read_bytes()
    for end in range(0, len(data.rstrip()), 97):
        path.write_bytes(data[:end])
        with pytest.raises(InputError):
            Manifest.load(path)


def test_images_that_changed_since_the_draw_are_named(manifest, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"images/{number}.png")
    with pytest.raises(InputError, match="8 images are missing") as caught:
        manifest.verify_images()
    assert "its bytes changed since the draw" in str(caught.value)
    assert json.dumps(str(tmp_path / "images/8.png")).strip('"') in str(caught.value)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_may_be_read_a_moment_later_is_no_wrong_input(manifest, tmp_path, monkeypatch, number):
    """A sweep tries a trial again after a WorkError, and gives it up at once after an InputError."""
    manifest.save(tmp_path / "manifest.json")

    def fails(_path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fails)
    kind = InputError if number == errno.EACCES else WorkError
    for read in (lambda: Manifest.load(tmp_path / "manifest.json"), lambda: read_image("1.png", tmp_path)):
        with pytest.raises(kind, match=rf"cannot be read \({os.strerror(number)}\)"):
            read()
