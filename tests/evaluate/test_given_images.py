"""What `hificl predict` and the logged models take for an image: a place, or the content itself; upright, and whole."""

from __future__ import annotations

import base64
import io
import textwrap

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline.core.errors import InputError
from pipeline.data.image_files import open_image
from pipeline.evaluate.answerer import _as_file

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def stored(form: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, form, **more)
    return buffer.getvalue()


def pixels(given) -> np.ndarray:
    with _as_file(given) as file:
        return np.asarray(open_image(file))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_an_image_is_a_place_or_base64(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = stored(form)
    text = base64.b64encode(content).decode()
    (tmp_path / "image").write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": {"bytes": content}}]), "s.parquet")
    wrapped = "\n".join(textwrap.wrap(text, 76))  # as the command base64 prints it
    for given in ("image", tmp_path / "image", "s.parquet#0/image", text, wrapped, f"data:image/x;base64,{text}"):
        assert np.array_equal(pixels(given), NOISE)
    with _as_file("image") as file:
        assert str(file) == "image"  # read where it lies


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_asks(orientation, tmp_path):
    """What a telephone stores: the sensor's rows, and how to turn them."""
    turns = {
        1: NOISE, 2: NOISE[:, ::-1], 3: NOISE[::-1, ::-1], 4: NOISE[::-1], 5: NOISE.swapaxes(0, 1),
        6: np.rot90(NOISE, -1), 7: NOISE[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(NOISE),
    }  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    (tmp_path / "photo.png").write_bytes(stored(exif=exif))
    for given in (tmp_path / "photo.png", base64.b64encode(stored(exif=exif)).decode()):
        assert np.array_equal(pixels(given), turns[orientation])
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.png")), NOISE)  # as data sets are


def test_broken_exif_beside_whole_pixels_turns_nothing(tmp_path):
    (tmp_path / "photo.png").write_bytes(stored(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"))
    assert np.array_equal(pixels(tmp_path / "photo.png"), NOISE)


def test_what_is_neither_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.png").write_bytes(stored()[:300])
    (tmp_path / "folder").mkdir()
    cut = base64.b64encode(stored()[:300]).decode()
    for given, says in (
        ("nowhere.png", "nowhere.png: the image file does not exist. Give an image's path, or its content in base64"),
        ("photo123", "photo123: the image file does not exist. Give"),  # would be base64, of no picture
        ("cut.png/x", "cut.png/x: the image file cannot be read (Not a directory). Give"),
        ("folder", "folder: the image file cannot be read (Is a directory). Give"),
        ("cut.png", "cut.png: the image is truncated"),
        (cut, "the image in base64: the image is truncated"),
        ("data:image/png;base64,aGVsbG8=", "the image in base64: the file is no image of a known format"),
        ("data:image/png,%89PNG", "data:image/png,%89PNG: neither a file nor an image in base64. Give"),
        ("x" * 5000, "x" * 77 + "...: neither a file nor an image in base64"),
        ("a\0b", "neither a file nor an image in base64"),
    ):
        with pytest.raises(InputError) as caught, _as_file(given):
            pass
        assert says in str(caught.value)


@pytest.mark.parametrize(
    "path", ["image.png", "/etc/hostname", "s.parquet#0/image", "../image.png", "file:///etc/hostname"]
)
def test_where_others_ask_no_path_is_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(stored())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": {"bytes": stored()}}]), "s.parquet")
    with (
        pytest.raises(InputError, match="(not an image in base64|no image of a known format).*"),
        _as_file(path, reads_files=False),
    ):
        pass
    text = base64.b64encode(stored()).decode()
    for given in (text, f"data:image/png;base64,{text}"):
        with _as_file(given, reads_files=False) as file:
            assert np.array_equal(np.asarray(open_image(file)), NOISE)


def test_a_logged_model_reads_no_path(monkeypatch, tmp_path):
    """What MLflow runs for a request gives an answerer that reads none."""
    from types import SimpleNamespace

    from pipeline.evaluate import answerer
    from pipeline.tracking.served import AdapterModel

    made = []
    monkeypatch.setattr(answerer, "Answerer", lambda *args, **names: made.append(names))
    AdapterModel().load_context(SimpleNamespace(artifacts={"adapter": str(tmp_path)}, model_config={"project": ""}))
    assert made[0]["reads_files"] is False
