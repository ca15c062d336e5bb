"""Images of every kind become 8-bit RGB, and bad ones are named."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import InputError
from pipeline.data.image_files import check_image, check_images, open_image, problems_error

RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))


def test_greyscale_cmyk_palette_and_alpha_become_rgb(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "grey.jpg", quality=95)
    Image.fromarray(RAMP).convert("RGB").convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    palette = Image.fromarray(RAMP).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes([0] * 128 + [255] * 128))
    rgba = Image.merge("RGBA", [Image.fromarray(RAMP)] * 3 + [Image.new("L", (64, 48), 0)])
    rgba.save(tmp_path / "alpha.png")
    for name, tolerance in [("grey.jpg", 3), ("cmyk.jpg", 4), ("palette.png", 0), ("alpha.png", 0)]:
        image = open_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (64, 48))
        difference = np.abs(np.asarray(image).astype(int) - RAMP[..., None])
        assert difference.max() <= tolerance, name


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 257, 1000, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "16.png")
    Image.fromarray(values).save(tmp_path / "16.tif")
    for name in ("16.png", "16.tif"):
        with Image.open(tmp_path / name) as stored:
            assert stored.mode.startswith("I")
        got = np.asarray(open_image(tmp_path / name))[0, :, 1]
        assert got.tolist() == [0, 0, 1, 4, 128, 255]


def test_the_stored_orientation_is_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(RAMP).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (64, 48)


def jpeg(width: int = 320, height: int = 240) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_image_is_named_in_opening_and_in_checking(tmp_path, kept):
    data = jpeg()
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=r"cut\.jpg: the image is (truncated|damaged)"):
        open_image(path)
    assert check_image(path).problem is not None


def test_a_truncated_png_is_named(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.png: the image is truncated"):
        open_image(path)
    assert "truncated" in (check_image(path).problem or "")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_metadata(kind: bytes, head: bytes, content: bytes) -> bytes:
    """A PNG of the ramp with one more chunk behind its header."""
    buffer = io.BytesIO()
    Image.fromarray(RAMP).convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    return data[:33] + chunk(kind, head + zlib.compress(content)) + data[33:]


XMP = b"XML:com.adobe.xmp\0\1\0\0\0"


@pytest.mark.parametrize(
    ("kind", "head", "content"),
    [
        (b"iCCP", b"x\0\0", bytes(1_300_000)),
        (b"iTXt", XMP, b"<x/>" * 400_000),
        (b"zTXt", b"Comment\0\0", bytes(9 << 20)),
    ],
)
def test_large_metadata_beside_whole_pixels_is_no_damage(tmp_path, kind, head, content):
    path = tmp_path / "x.png"
    path.write_bytes(with_metadata(kind, head, content))
    assert check_image(path).problem is None
    assert np.array_equal(np.asarray(open_image(path))[..., 0], RAMP)


def test_metadata_beyond_the_limit_is_called_by_its_name(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(with_metadata(b"iTXt", XMP, bytes(17 << 20)))
    with pytest.raises(InputError, match=r"x\.png: the image carries more text .* than the limit of 16 MiB") as caught:
        open_image(path)
    assert "Save it without" in str(caught.value) and "again" not in str(caught.value)


def test_sixteen_bits_take_no_more_memory_than_the_picture(tmp_path):
    """Twelve million pixels; eight bytes for each would be 100 MB, several times over."""
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((3000, 4000), np.uint16)).save(path)
    code = (
        "import resource, sys; from pipeline.data.image_files import open_image; from PIL import Image; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; open_image(sys.argv[1]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # KiB: 24 MB stored, 12 as grey, 48 as Pillow keeps RGB, and copies


def test_a_decompression_bomb_is_refused(tmp_path):
    for side in (14_000, 60_000):  # above our limit, and above twice it, where Pillow itself raises
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        path = tmp_path / "bomb.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        with pytest.raises(InputError, match="more pixels than the limit"):
            open_image(path)
        assert "refused" in (check_image(path).problem or "")


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"<html>not found</html>")
    for name, says in [
        ("absent.jpg", "does not exist"),
        ("empty.jpg", "is empty"),
        ("text.jpg", "no image of a known"),
    ]:
        with pytest.raises(InputError, match=says):
            open_image(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path)


def test_all_bad_files_are_in_one_error_and_the_good_have_digests(tmp_path):
    data = jpeg()
    for name, content in [("a.jpg", data), ("b.jpg", data[:500]), ("d.jpg", b"")]:
        (tmp_path / name).write_bytes(content)
    ticks: list[int] = []
    found = check_images([tmp_path / f"{letter}.jpg" for letter in "abcd"], progress=ticks.append)
    assert sum(ticks) == 4
    assert [image.path.name for image in found if image.problem] == ["b.jpg", "c.jpg", "d.jpg"]
    assert found[0].sha256 == hashlib.sha256(data).hexdigest()
    text = str(problems_error([image for image in found if image.problem], where="vqav2"))
    assert "3 images are missing" in text and all(f"{letter}.jpg" in text for letter in "bcd")
