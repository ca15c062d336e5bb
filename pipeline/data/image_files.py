"""An image's bytes, digest and size, wherever it is: the one answer for prompts, training, evaluation and pages.

Where it is: a file, or a cell of a Parquet shard (`data.parquet.cell_name`). Where a digest is known, the bytes must
have it, so what is computed from an image and kept under its digest is never another image's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.data.images import os_problem, read_image_bytes, size_of
from pipeline.data.sample import ImageRef
from pipeline.errors import InputError

Image = ImageRef | Path | str
Size = tuple[int, int]  # height, width, as stored

_SIZES: dict[str, Size] = {}  # by digest


def located(image: Image, root: Path | str = "") -> Path:
    """Return the place of an image below the data root."""
    return Path(root) / (image.path if isinstance(image, ImageRef) else image)


def read(image: Image, root: Path | str = "") -> bytes:
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
    wanted = image.sha256 if isinstance(image, ImageRef) else ""
    if wanted and (found := hashlib.sha256(data).hexdigest()) != wanted:
        raise InputError(
            changed(found, wanted), where=str(path), way_out="Draw the samples again, or put the old file back"
        )
    return data


def changed(found: str, wanted: str) -> str:
    """Return what a message says about an image whose bytes are not those of the draw."""
    return f"its bytes changed since the draw (SHA-256 {found[:12]}, was {wanted[:12]})"


def digest(image: Image, root: Path | str = "") -> str:
    """Return the sha256 of the image's bytes; only those whose digest is not known are read, each time.

    Raises:
        InputError: as `read`.
    """
    if isinstance(image, ImageRef) and image.sha256:
        return image.sha256
    return hashlib.sha256(read(image, root)).hexdigest()


def size(image: Image, root: Path | str = "") -> Size:
    """Return height and width, from the header; remembered by digest where it is known.

    Raises:
        InputError: as `read`, or it is no image.
    """
    key = image.sha256 if isinstance(image, ImageRef) else ""
    if key in _SIZES:
        return _SIZES[key]
    found = size_of(read(image, root), str(located(image, root)))
    if key:
        _SIZES[key] = found
    return found
