"""Images of the miniature world: eight attributes in, 32 x 32 RGB bytes out.

Only integer and exactly rounded float arithmetic is used, so a seed gives the same bytes everywhere.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from pipeline.miniature.lexicon import COLOUR, COUNT, DOT, FRAME, GROUND, NUM_VALUES, SHAPE, SIDE, TEXTURE

IMAGE_SIZE = 32
_OBJECT_RGB = np.array(
    [(220, 30, 30), (30, 190, 50), (40, 70, 230), (235, 225, 40), (215, 40, 215), (40, 215, 225), (250, 250, 250)]
    + [(245, 140, 20)],
    dtype=np.int16,
)
_SHADED_RGB = (_OBJECT_RGB.astype(np.int32) * 90 // 255).astype(np.int16)  # a texture's dark stripes
_GROUND_RGB = np.array(
    [(10, 10, 10), (128, 128, 128), (10, 10, 100), (100, 60, 25), (250, 175, 190), (100, 110, 30)], dtype=np.int16
)
_FRAME_RGB = _OBJECT_RGB[:6]
_DOT_RGB = _OBJECT_RGB[:6]
_CELLS = np.array([(9, 9), (9, 23), (23, 9), (23, 23)], dtype=np.int16)  # where objects stand, (row, column)
_DOT_PLACES = np.array([(4, 16), (27, 16), (16, 4), (16, 27)], dtype=np.int16)  # by the value of `side`
NOISE = 12  # pixels are moved by at most this much, of 255


def draw_attributes(num_images: int, rng: np.random.Generator) -> np.ndarray:
    """Return attribute values [num_images, 8], each uniform and independent."""
    return np.stack([rng.integers(0, size, num_images) for size in NUM_VALUES], axis=1)


def render_images(attributes: np.ndarray, rng: np.random.Generator, noise: int = NOISE) -> np.ndarray:
    """Draw images.

    Args:
        attributes: integers [N, 8] in the order of `lexicon.ATTRIBUTES`.
        rng: places, sizes and pixel noise.
        noise: pixels are moved by at most this much, of 255.

    Returns:
        uint8 [N, 32, 32, 3].
    """
    count = len(attributes)
    row, column = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.int16)
    images = np.broadcast_to(
        _GROUND_RGB[attributes[:, GROUND]][:, None, None, :], (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    ).copy()
    places = np.argsort(rng.random((count, len(_CELLS))), axis=1)
    for nth in range(NUM_VALUES[COUNT]):
        centre = _CELLS[places[:, nth]] + rng.integers(-1, 2, (count, 2)).astype(np.int16)
        radius = rng.integers(5, 7, count).astype(np.int16)[:, None, None]
        down = row[None] - centre[:, 0, None, None]
        across = column[None] - centre[:, 1, None, None]
        inside = _shape(attributes[:, SHAPE], down, across, radius)
        inside &= (nth <= attributes[:, COUNT])[:, None, None]
        light = _texture(attributes[:, TEXTURE], down, across)
        paints = (_OBJECT_RGB, _SHADED_RGB)
        bright, dark = (paint[attributes[:, COLOUR]][:, None, None, :] for paint in paints)
        colour = np.where(light[..., None], bright, dark)
        images = np.where(inside[..., None], colour, images)
    dot = _DOT_PLACES[attributes[:, SIDE]]
    near = (np.abs(row[None] - dot[:, 0, None, None]) <= 2) & (np.abs(column[None] - dot[:, 1, None, None]) <= 2)
    images = np.where(near[..., None], _DOT_RGB[attributes[:, DOT]][:, None, None, :], images)
    edge = (row < 2) | (row >= IMAGE_SIZE - 2) | (column < 2) | (column >= IMAGE_SIZE - 2)
    images = np.where(edge[None, ..., None], _FRAME_RGB[attributes[:, FRAME]][:, None, None, :], images)
    moved = images + rng.integers(-noise, noise + 1, images.shape)
    return np.clip(moved, 0, 255).astype(np.uint8)


def _shape(shape: np.ndarray, down: np.ndarray, across: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return [N, 32, 32]: which pixels the shape covers, given their offsets from its centre."""
    high, wide = np.abs(down), np.abs(across)
    masks = [
        down**2 + across**2 <= radius**2,
        (high <= radius - 1) & (wide <= radius - 1),
        (down <= radius - 1) & (down >= -radius) & (2 * wide <= down + radius),
        ((high <= 1) & (wide <= radius)) | ((wide <= 1) & (high <= radius)),
        high + wide <= radius + 1,
        (high <= 2) & (wide <= radius + 1),
    ]
    return _pick(masks, shape)


def _texture(texture: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Return [N, 32, 32]: which pixels the texture leaves bright."""
    rows, posts = (down // 2) % 2 == 0, (across // 2) % 2 == 0
    return _pick([np.ones_like(rows), rows, posts, rows == posts], texture)


def _pick(masks: list[np.ndarray], which: np.ndarray) -> np.ndarray:
    return np.choose(which[:, None, None], masks)


def png_bytes(image: np.ndarray) -> bytes:
    """Encode one RGB image [H, W, 3] uint8 as PNG.

    The pixel stream is stored, not compressed, so the bytes do not depend on which zlib is installed.
    """
    height, width, _ = image.shape
    raw = b"".join(b"\x00" + line.tobytes() for line in np.ascontiguousarray(image))
    if len(raw) > 0xFFFF:
        raise ValueError(f"one stored block holds 65,535 bytes, this image needs {len(raw)}")
    stream = b"\x78\x01\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw
    stream += struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
