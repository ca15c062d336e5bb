"""An image's bytes, digest and size, for prompts, training, evaluation and pages alike.

An image is a file, or a cell of a Parquet shard (`data.parquet.cell_name`). Where its digest is known, the bytes are
checked against it: what is computed from an image and stored under its digest is then never another image's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.data.images import os_problem, read_image_bytes, size_of
from pipeline.data.parquet import shard_order
from pipeline.data.sample import ImageRef

Image = ImageRef | Path | str
ImageSize = tuple[int, int]  # height, width, as stored

_SIZES: dict[str, ImageSize] = {}  # by digest
_THREADS = 8


def located(image: Image, root: Path | str = "") -> Path:
    """Return the place of an image below the data root."""
    return Path(root) / (image.path if isinstance(image, ImageRef) else image)


def read_image(image: Image, root: Path | str = "") -> bytes:
    """Return the image's bytes.

    Raises:
        InputError: it is missing, cannot be read, or is no longer what was drawn.
    """
    path = located(image, root)
    try:
        data = read_image_bytes(path)
    except OSError as error:
        way_out = "Check the data root, or get it again"
        raise InputError(os_problem(error), where=str(path), way_out=way_out) from error
    wanted = _key(image)
    if wanted and (actual := hashlib.sha256(data).hexdigest()) != wanted:
        raise InputError(
            changed(actual, wanted), where=str(path), way_out="Draw the samples again, or put the old file back"
        )
    return data


def changed(actual: str, wanted: str) -> str:
    """Return what a message says about an image whose bytes are not those of the draw."""
    return f"its bytes changed since the draw (SHA-256 {actual[:12]}, was {wanted[:12]})"


def image_digest(image: Image, root: Path | str = "") -> str:
    """Return the sha256 of the image's bytes; only those whose digest is not known are read, each time.

    Raises:
        InputError: as `read_image`.
    """
    return _key(image) or hashlib.sha256(read_image(image, root)).hexdigest()


def sizes(images: Sequence[Image], root: Path | str = "") -> list[ImageSize]:
    """Return each image's height and width, from the header; remembered by digest where it is known.

    Raises:
        InputError: as `read_image`, or it is no image.
    """
    unknown = {image for image in images if _key(image) not in _SIZES}
    read: dict[Image, ImageSize] = {}
    if unknown:
        # a shard is read by whole row groups, so its images are taken one after the other
        order = sorted(unknown, key=lambda image: shard_order(str(located(image, root))))
        with ThreadPoolExecutor(min(_THREADS, len(order))) as threads:
            contents = threads.map(lambda image: size_of(read_image(image, root), str(located(image, root))), order)
            read = dict(zip(order, contents, strict=True))
        _SIZES.update({_key(image): size for image, size in read.items() if _key(image)})
    return [read[image] if image in read else _SIZES[_key(image)] for image in images]


def _key(image: Image) -> str:
    return image.sha256 if isinstance(image, ImageRef) else ""
