"""Image files: bytes, digest and size, and what the models see of them: decoded to the end, as 8-bit RGB.

An image is a file, or a cell of a Parquet shard (`data.parquet.cell_name`). Where its digest is known, the bytes are
checked against it: what is computed from an image and stored under its digest is then never another image's.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.errors import InputError, of_an_extra
from pipeline.core.files import read_error
from pipeline.data import MAX_PIXELS
from pipeline.data.parquet import cell_bytes, is_cell, shard_order
from pipeline.data.sample import ImageRef

if TYPE_CHECKING:
    from PIL import Image

# What is opened. Pillow knows more, and would start Ghostscript for a picture in PostScript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N", "I"}
_BAND = 256  # rows
_LARGE = 16_000_000  # pixels: of such pictures one is decoded at a time
_one_at_a_time = threading.Lock()
_TURNS: dict[object, str] = {  # by EXIF orientation, Pillow's `Transpose`; 1 is upright
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
# What one piece of a PNG's text or its colour profile may unpack to. Pillow's own limit of 1 MiB refuses whole
# pictures: printers' profiles and XMP have several.
MAX_METADATA = 16 << 20


@functools.cache
def _pillow() -> Any:
    """Return `PIL.Image` with this module's limit; imported at the first picture, for a text decoder needs none."""
    with of_an_extra():
        from PIL import Image, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = MAX_METADATA
    return Image


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """What a check found about one file: its digest, or what is wrong with it."""

    path: Path
    sha256: str
    problem: str | None = None


def open_image(path: Path | str) -> Image.Image:
    """Return the picture as 8-bit RGB.

    Greyscale, CMYK and palette pictures are converted; transparent pixels keep the colour stored under
    them (Pillow's `convert("RGB")`, which the published pipelines call); 16-bit greyscale is scaled by
    255/65535, because `convert` would clip everything above 255 to white. EXIF orientation is not
    applied: the published pipelines read COCO and Flickr30k without it, and the human answers of VQAv2
    were given to the stored orientation. `upright` applies it to a picture that somebody hands in.

    Raises:
        InputError: the file is missing, no picture, cut short, or unreasonably large; the path is named.
    """
    path = Path(path)
    try:
        data = read_image_bytes(path)
    except OSError as error:
        raise _problem(path, os_problem(error)) from error
    return decode_image(data, str(path))


def thumbnail(path: Path, side: int, form: str, quality: int) -> bytes | None:
    """Return a picture of at most `side` pixels as a file of the format `form`; None where it cannot be opened."""
    try:
        image = open_image(path)
    except InputError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, form, quality=quality)
    return buffer.getvalue()


def upright(data: bytes, name: str) -> bytes | None:
    """Return the picture as its camera wants it shown, stored anew without loss; None where it is stored so.

    For pictures that people hand in, such as a telephone's; those of data sets are read as they are stored.

    Raises:
        InputError: as `open_image`.
    """
    try:
        with _opened(data) as image:
            turn = _TURNS.get(_orientation(image))
            if turn is None:
                return None
            buffer = io.BytesIO()
            _to_rgb(image).transpose(_pillow().Transpose[turn]).save(buffer, "PPM")
            return buffer.getvalue()
    except _decode_errors() as error:
        raise _problem(name, _decode_problem(error, data)) from error


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_pillow().ExifTags.Base.Orientation)
    except _decode_errors(struct.error):  # broken EXIF beside whole pixels
        return None


def read_image_bytes(path: Path | str) -> bytes:
    """Return the bytes of an image file, or of an image inside a Parquet shard (`data.parquet.cell_name`).

    Raises:
        OSError: it is missing or cannot be read.
    """
    return cell_bytes(path) if is_cell(path) else Path(path).read_bytes()


def decode_image(data: bytes, name: str) -> Image.Image:
    """Return the picture in `data` as 8-bit RGB, as `open_image` does; `name` is what messages call it."""
    try:
        with _opened(data) as image:
            return _to_rgb(image)
    except _decode_errors() as error:
        raise _problem(name, _decode_problem(error, data)) from error


def size_of(data: bytes, name: str) -> tuple[int, int]:
    """Return height and width of the picture in `data`, as stored, from its header alone."""
    try:
        with _opened(data) as image:
            return image.height, image.width
    except _decode_errors() as error:
        raise _problem(name, _decode_problem(error, data)) from error


def check_image(path: Path) -> CheckedImage:
    """Read and decode the file to its last row; never raises for a bad file.

    A JPEG is decoded at an eighth of its size: every coefficient is still read, so a cut or damaged
    stream is still found, in about half the time.
    """
    try:
        data = read_image_bytes(path)
    except OSError as error:
        return CheckedImage(path, "", os_problem(error))
    digest = hashlib.sha256(data).hexdigest()
    try:
        with _opened(data) as image, _one_at_a_time if image.width * image.height > _LARGE else nullcontext():
            if image.format == "JPEG":
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except _decode_errors() as error:
        return CheckedImage(path, digest, _decode_problem(error, data))
    return CheckedImage(path, digest)


def check_images(paths: Iterable[Path], *, progress: Callable[[int], None] | None = None) -> list[CheckedImage]:
    """Check every file once, in threads, with a call of `progress` each; the results come in the order of `paths`.

    Returns:
        One entry a path; those with a `problem` are the bad ones. All are looked at, none stops the rest.
    """
    given = list(paths)
    by_path: dict[Path, CheckedImage] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        # a shard is read by whole row groups, so its images are taken one after the other
        for checked in threads.map(check_image, sorted(set(given), key=lambda path: shard_order(str(path)))):
            by_path[checked.path] = checked
            if progress is not None:
                progress(1)
    return [by_path[path] for path in given]


def problems_error(
    problems: Iterable[CheckedImage], *, where: str, named_by: Mapping[Path, str] | None = None
) -> InputError:
    """Return one error that lists every bad file, and what names it where that is known."""
    bad, rows = list(problems), named_by or {}
    lines = "".join(
        f"\n  {image.path}{f' ({rows[image.path]})' if image.path in rows else ''}: {image.problem}" for image in bad
    )
    plural = "image is" if len(bad) == 1 else "images are"
    way_out = "Get these files again (for COCO: train2014.zip, val2014.zip), or take them out of the data"
    if rows:
        set_so = "bad_rows: leave-out (adapt: --bad-rows leave-out)"
        way_out = f"Mend these pictures or take their rows out; or {set_so}, and they are counted and named"
    return InputError(f"{len(bad)} {plural} missing or cannot be read:{lines}\n", where=where, way_out=way_out)


class _TooLarge(Exception):
    """More pixels than any picture of a benchmark has: a decompression bomb or a broken header."""


_METADATA = "more text or a larger colour profile"


def _decode_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    bomb = _pillow().DecompressionBombError
    return OSError, SyntaxError, ValueError, EOFError, IndexError, _TooLarge, bomb, *more


def _opened(data: bytes) -> Image.Image:
    pillow = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # the limit below is the rule
        image: Image.Image = pillow.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise _TooLarge(f"{image.width} x {image.height} pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image)
        # Mode I is what older Pillow makes of a 16-bit PNG; its values may also be 8-bit ones.
        top = 65535.0 if image.mode != "I" or grey.max(initial=0) > 255 else 255.0
        scaled = np.empty(grey.shape, np.uint8)
        for row in range(0, len(grey), _BAND):  # the whole in eight bytes a pixel would take gigabytes
            band = grey[row : row + _BAND].astype(np.float64) * (255.0 / top)
            scaled[row : row + _BAND] = np.clip(np.rint(band), 0, 255)
        return _pillow().fromarray(scaled).convert("RGB")
    if image.mode in {"P", "PA"} and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # Pillow warns, and may differ, on the direct way
    return image.convert("RGB")


def _problem(path: Path | str, what: str) -> InputError:
    way_out = "Save it without" if _METADATA in what else "Get the file again"
    return InputError(what, where=str(path), way_out=f"{way_out}, or take it out of the data")


def os_problem(error: OSError) -> str:
    """Return what a message says about an image that cannot be read."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:  # a shard that lacks it has no file name
        return "the image file does not exist"
    return f"the image file cannot be read ({error.strerror or error})"


def _decode_problem(error: Exception, data: bytes) -> str:
    if not data:
        return "the image file is empty"
    if isinstance(error, (_TooLarge, _pillow().DecompressionBombError)):
        return f"the image claims more pixels than the limit of {MAX_PIXELS} ({error}); refused"
    if "MAX_TEXT" in str(error):
        return f"the image carries {_METADATA} than the limit of {MAX_METADATA >> 20} MiB; its pixels were not read"
    if isinstance(error, _pillow().UnidentifiedImageError):
        return f"the file is no image of a known format (it begins with {data[:8]!r})"
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return f"the image is truncated ({len(data)} bytes: {error})"
    return f"the image is damaged ({error})"


ImageSource = ImageRef | Path | str
ImageSize = tuple[int, int]  # height, width, as stored

_SIZES: dict[str, ImageSize] = {}  # by digest
_THREADS = 8


def located(image: ImageSource, root: Path | str = "") -> Path:
    """Return the place of an image below the data root."""
    return Path(root) / (image.path if isinstance(image, ImageRef) else image)


def read_image(image: ImageSource, root: Path | str = "") -> bytes:
    """Return the image's bytes.

    Raises:
        InputError: it is missing, cannot be read, or is no longer what was drawn.
        WorkError: the system does not let it be read now.
    """
    path = located(image, root)
    try:
        data = read_image_bytes(path)
    except OSError as error:
        raise read_error(error, os_problem(error), str(path), "Check the data root, or get it again") from error
    wanted = _key(image)
    if wanted and (actual := hashlib.sha256(data).hexdigest()) != wanted:
        raise InputError(
            changed(actual, wanted), where=str(path), way_out="Draw the samples again, or put the old file back"
        )
    return data


def changed(actual: str, wanted: str) -> str:
    """Return what a message says about an image whose bytes are not those of the draw."""
    return f"its bytes changed since the draw (SHA-256 {actual[:12]}, was {wanted[:12]})"


def image_digest(image: ImageSource, root: Path | str = "") -> str:
    """Return the sha256 of the image's bytes; only those whose digest is not known are read, each time.

    Raises:
        InputError: as `read_image`.
    """
    return _key(image) or hashlib.sha256(read_image(image, root)).hexdigest()


def sizes(images: Sequence[ImageSource], root: Path | str = "") -> list[ImageSize]:
    """Return each image's height and width, from the header; remembered by digest where it is known.

    Raises:
        InputError: as `read_image`, or it is no image.
    """
    unknown = {image for image in images if _key(image) not in _SIZES}
    read: dict[ImageSource, ImageSize] = {}
    if unknown:
        # a shard is read by whole row groups, so its images are taken one after the other
        order = sorted(unknown, key=lambda image: shard_order(str(located(image, root))))
        with ThreadPoolExecutor(min(_THREADS, len(order))) as threads:
            contents = threads.map(lambda image: size_of(read_image(image, root), str(located(image, root))), order)
            read = dict(zip(order, contents, strict=True))
        _SIZES.update({_key(image): size for image, size in read.items() if _key(image)})
    return [read[image] if image in read else _SIZES[_key(image)] for image in images]


def _key(image: ImageSource) -> str:
    return image.sha256 if isinstance(image, ImageRef) else ""
