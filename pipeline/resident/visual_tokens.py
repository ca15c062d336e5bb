"""Visual tokens of an image, computed once: in memory, on disk, or by the frozen vision tower and connector.

Valid for every method that leaves both frozen. A method that trains the vision tower reads `VisualTokens.pixels`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from pipeline.backbones.base import IMAGE_BACKEND, Pixels, gathered, placed
from pipeline.core import machine
from pipeline.data import image_files
from pipeline.data.image_files import ImageSource, decode_image

if TYPE_CHECKING:
    from pipeline.backbones.load import Loaded

GIB = 1 << 30
LEAST_MEMORY = GIB // 4  # bytes
THREADS = 4  # that decode and process pictures beside a GPU: some 20 ms of a core each
MOST_UNDERWAY = 64  # pictures; an Idefics2 one takes 9 MB
OF_THE_DISK = 0.8  # the rest is for what else is written: adapters, checkpoints, MLflow
_CODE = ("pillow", "torch", "transformers")  # what reads pictures and computes on them


class VisualTokens:
    """Visual tokens by image, each computed once.

    The key is the sha256 of the image's bytes, the processor's settings, the backbone's digest and the versions of what
    computes: the same picture under two names is one entry, and nothing computed with other weights is ever read.

    Args:
        loaded: the backbone; its vision tower and connector must stay as loaded.
        cache_dir: folder of the store on disk, shared by any number of processes; None: memory only.
        memory_bytes: most that is kept in memory; the least recently used goes first. None: an eighth of what is free,
            for a node may have eight processes; 1,500 images of a LLaVA are 9 GB.
        disk_bytes: most that all stores of `cache_dir` have on disk, about; the least recently used goes first. None:
            four fifths of what they have and what is free.
        batch_size: images the vision tower sees at once.
        threads: that make pictures ready ahead of their use (`ahead`). None: a few beside a GPU, which computes while
            they work; none on a CPU.
    """

    def __init__(
        self,
        loaded: Loaded,
        cache_dir: Path | str | None = None,
        *,
        memory_bytes: int | None = None,
        disk_bytes: int | None = None,
        batch_size: int = 32,
        threads: int | None = None,
    ) -> None:
        self.loaded, self.batch_size = loaded, batch_size
        if threads is None:
            threads = 0 if loaded.device.type == "cpu" else THREADS
        self._threads = ThreadPoolExecutor(threads, "pictures") if threads else None
        self._underway: dict[str, Future[Pixels]] = {}
        self.settings = _settings_digest(loaded)
        self.disk: DiskStore | None = None
        if cache_dir is not None:
            self.disk = DiskStore(Path(cache_dir) / self.settings[:16], disk_bytes, Path(cache_dir))
        if memory_bytes is None:
            memory_bytes = max(LEAST_MEMORY, machine.free_memory() // 8)
        self.computed = 0  # images that went through the vision tower
        self._memory: Recent[str, Tensor] = Recent(memory_bytes, lambda tokens: tokens.nbytes)
        self._pixels: Recent[str, Pixels] = Recent(
            memory_bytes, lambda pixels: sum(part.nbytes for part in pixels.values())
        )

    def get(self, images: Sequence[ImageSource], root: Path | str = "") -> list[Tensor]:
        """Return the visual tokens [T, D] of every image below `root`, in order, on the CPU.

        Raises:
            InputError: an image cannot be read.
        """
        keys = [image_files.image_digest(image, root) for image in images]
        known: dict[str, Tensor] = {}
        missing: dict[str, ImageSource] = {}
        for key, image in zip(keys, images, strict=True):
            if key in known or key in missing:
                continue
            tokens = self._memory.get(key)
            if tokens is None and self.disk is not None:
                tokens = self.disk.read(key)
            if tokens is None:
                missing[key] = image
            else:
                known[key] = self._memory.put(key, tokens)
        # a tower that ranks have in parts runs on all of them: all compute what one lacks, in one order
        of_ranks = self.loaded.passes.of_ranks(missing)
        missing = {key: image for of_rank in of_ranks for key, image in of_rank.items()}
        for key, tokens in self._compute(missing, root):
            if self.disk is not None:
                self.disk.write(key, tokens)
            known[key] = self._memory.put(key, tokens)
        return [known[key] for key in keys]

    def prefetch(self, images: Iterable[ImageSource], root: Path | str = "") -> None:
        """Compute what is not on disk (or, without a disk, in memory) yet, a batch at a time."""
        pending: list[ImageSource] = []
        for image in images:
            pending.append(image)
            if len(pending) == self.batch_size:
                self.get(pending, root)
                pending = []
        if pending:
            self.get(pending, root)

    def ahead(self, images: Iterable[ImageSource], root: Path | str = "", *, pixels: bool = False) -> None:
        """Begin to make pictures ready that `get` will ask for next (or `pixels`), where they are not at hand.

        What they become is the same; it is there sooner, beside what a GPU computes. Without threads nothing is done.
        """
        for image in images:
            if self._threads is None or len(self._underway) >= MOST_UNDERWAY:
                return
            key = image_files.image_digest(image, root)
            known = self._pixels if pixels else self._memory
            on_disk = not pixels and self.disk is not None and self.disk.path(key).exists()
            if key not in self._underway and key not in known and not on_disk:
                place, data = str(image_files.located(image, root)), image_files.read_image(image, root)
                self._underway[key] = self._threads.submit(self._decoded, data, place)

    def forget_ahead(self) -> None:
        """Drop the pictures that were made ready and not asked for."""
        for future in self._underway.values():
            future.cancel()
        self._underway.clear()

    def pixels(self, rows: Sequence[Sequence[ImageSource]], root: Path | str = "") -> dict[str, Tensor]:
        """Return the model's pixel arguments for the rows of a batch, for methods that train the vision tower."""
        dtype = self.loaded.dtype
        blocks = [
            [self._processed(image_files.image_digest(image, root), image, root) for image in row] for row in rows
        ]
        stacked = self.loaded.family.stack(blocks)
        return {name: part.to(dtype) if part.is_floating_point() else part for name, part in stacked.items()}

    def _compute(self, images: Mapping[str, ImageSource], root: Path | str) -> Iterable[tuple[str, Tensor]]:
        groups: dict[tuple, list[tuple[str, Pixels]]] = {}
        for number, (key, image) in enumerate(images.items()):
            if number % THREADS == 0:
                self.ahead(islice(images.values(), number, number + 2 * THREADS), root)
            pixels = self._processed(key, image, root, keep=False)
            # Pictures of one size go together: padding would make an image's tokens depend on its neighbours.
            shape = tuple((name, tuple(part.shape)) for name, part in sorted(pixels.items()))
            group = groups.setdefault(shape, [])
            group.append((key, pixels))
            if len(group) == self.batch_size:
                yield from self._encoded(group)
                group.clear()
        for group in groups.values():
            if group:
                yield from self._encoded(group)

    def _encoded(self, group: Sequence[tuple[str, Pixels]]) -> list[tuple[str, Tensor]]:
        return self.loaded.passes.run("the vision tower", group, self._encode)

    @torch.no_grad()
    def _encode(self, group: Sequence[tuple[str, Pixels]]) -> list[tuple[str, Tensor]]:
        device, dtype = self.loaded.device, self.loaded.dtype
        blocks = [
            {
                name: placed(part, device).to(dtype if part.is_floating_point() else part.dtype)
                for name, part in pixels.items()
            }
            for _, pixels in group
        ]
        model = self.loaded.model
        with gathered(model, getattr(model, "model", model), inside=False):  # which the tower uses and nobody calls
            tokens = self.loaded.family.encode_images(model, blocks)
        self.computed += len(group)
        # One transfer for all; cloned, for a slice of the batch's result would keep the whole of it alive.
        # Some families' tokens of one picture have a shape of their own.
        on_host = (
            torch.cat([part.detach().flatten() for part in tokens]).to("cpu").split([part.numel() for part in tokens])
        )
        parts = zip(group, on_host, tokens, strict=True)
        return [(key, host.view(part.shape).clone()) for (key, _), host, part in parts]

    def _processed(self, key: str, image: ImageSource, root: Path | str, *, keep: bool = True) -> Pixels:
        pixels = self._pixels.get(key)
        if pixels is None:
            underway = self._underway.pop(key, None)
            if underway is not None:
                pixels = underway.result()
            else:
                pixels = self._decoded(image_files.read_image(image, root), str(image_files.located(image, root)))
            if keep:
                self._pixels.put(key, pixels)
        return pixels

    def _decoded(self, data: bytes, place: str) -> Pixels:
        picture = decode_image(data, place)
        self.loaded.family.check_size(picture.height, picture.width, place)
        return self.loaded.family.process(self.loaded.processor, picture)


class DiskStore:
    """Tensors by key, one safetensors file each, in a folder that many processes share.

    A file appears whole by an atomic rename, is memory-mapped when read, and is thrown away when its checksum does not
    fit. Above the limit the files used longest ago are removed.

    Args:
        folder: the store.
        limit: bytes; passed over by at most what several writers add at the same time. None: `OF_THE_DISK` of what is
            there and free.
        together: the folder of all stores that share the limit; None: this one has it alone.
    """

    KEPT = 0.9  # share of the limit that is left after a removal, so that not every write removes

    def __init__(self, folder: Path, limit: int | None, together: Path | None = None) -> None:
        self.folder, self.together = folder, together or folder
        self._limit = limit
        self._size: int | None = None

    @cached_property
    def limit(self) -> int:
        """Bytes that the store, and those that it shares the room with, may have; asked for at the first write."""
        if self._limit is not None:
            return self._limit
        free = shutil.disk_usage(self.folder).free
        return int(OF_THE_DISK * (free + sum(size for _, size, _ in self._files())))

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Tensor | None:
        """Return the tensor under `key`, or None where there is none or it is damaged."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {}).get("crc32")
                tensor = file.get_tensor("tokens")
            if str(_crc32(tensor)) == checksum:
                with suppress(OSError):  # another user's, or a read-only disk: as good as any
                    os.utime(path)  # the time of last use, which the removal goes by
                return tensor
        except OSError:  # no such file, or not now, which says nothing of its content
            return None
        except (SafetensorError, ValueError):
            if not _is_damaged(path):
                return None
        with suppress(OSError):
            path.unlink()
        return None

    def write(self, key: str, tensor: Tensor) -> None:
        """File `tensor` under `key`; a full or read-only disk is no error, the entry is then computed again."""
        path = self.path(key)
        data = save({"tokens": tensor.contiguous()}, metadata={"crc32": str(_crc32(tensor))})
        temporary = path.with_name(f".{key}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            return
        self._size = sum(size for _, size, _ in self._files()) if self._size is None else self._size + len(data)
        if self._size > self.limit:
            self._remove_oldest()

    def _files(self) -> list[tuple[float, int, Path]]:
        files = []
        for path in self.together.glob("**/*.safetensors"):
            try:
                state = path.stat()
            except OSError:
                continue  # another process was quicker
            files.append((state.st_mtime, state.st_size, path))
        return files

    def _remove_oldest(self) -> None:
        files = sorted(self._files())
        size = sum(length for _, length, _ in files)
        for _, length, path in files:
            if size <= self.limit * self.KEPT:
                break
            with suppress(OSError):
                path.unlink()  # whoever has it mapped keeps it
            size -= length
        self._size = size


def _is_damaged(path: Path) -> bool:
    """Whether a file's content is no safetensors; `safe_open` says the same where the system could not open it."""
    try:
        load(path.read_bytes())
    except OSError:
        return False
    except (SafetensorError, ValueError):
        return True
    return False


def _settings_digest(loaded: Loaded) -> str:
    images = getattr(loaded.processor, "image_processor", None)  # a text decoder has none
    settings = {
        "weights": loaded.digest,
        "dtype": str(loaded.dtype),
        "processor": images.to_dict() if images is not None else {},
        "class": type(images).__name__,
        "code": {name: _version(name) for name in _CODE},
        "backend": IMAGE_BACKEND,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # Pillow, where nobody shows a picture
        return None


def _crc32(tensor: Tensor) -> int:
    data: Any = tensor.contiguous().view(torch.uint8).numpy()
    return zlib.crc32(data)


K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The most recently used values; one that is larger than all the room is given back and not kept.

    Args:
        maxsize: bytes, or what `getsizeof` counts.
        getsizeof: bytes of a value.
    """

    def __init__(self, maxsize: int, getsizeof: Callable[[V], int]) -> None:
        self.maxsize, self.getsizeof = maxsize, getsizeof
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()  # with their sizes, the one used longest ago first
        self._size = 0

    def put(self, key: K, value: V) -> V:
        """Keep a value, dropping those used longest ago where there is no room; return it, or the one kept before."""
        known = self.get(key)
        size = self.getsizeof(value)
        if known is not None or size > self.maxsize:
            return value if known is None else known
        while self._size + size > self.maxsize:
            _, (_, freed) = self._kept.popitem(last=False)
            self._size -= freed
        self._kept[key] = value, size
        self._size += size
        return value

    def get(self, key: K) -> V | None:
        """Return what is kept under a key, as used last; None where nothing is."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self._size = 0
