"""Karpathy's split files (cs.stanford.edu/people/karpathy/deepimagesent): one file with every split and all captions.

`dataset_coco.json` divides COCO 2014 anew: train 82,783, restval 30,504, val 5,000 and test 5,000 images, where all but
train lie in `val2014`. `dataset_flickr30k.json` has train 29,000, val 1,014 and test 1,000.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pipeline.core.errors import InputError, nearest
from pipeline.data.files import field, find
from pipeline.data.records import RecordFile
from pipeline.data.sample import Sample
from pipeline.scores.files import printable
from pipeline.tasks.base import IndexEntry, SampleId, Split, Task
from pipeline.tasks.caption_files import caption_sample, plain_file_name

# Which of the file's parts a split is: the usual choice, and that of MimIC's code.
PARTS: Mapping[str, Mapping[Split, tuple[str, ...]]] = {
    "karpathy": {"train": ("train", "restval"), "evaluation": ("test",)},
    "karpathy-val": {"train": ("train",), "evaluation": ("val",)},
}
_KNOWN_PARTS = ("train", "restval", "val", "test")


@dataclass(frozen=True)
class SplitFile:
    """One of the files.

    Attributes:
        name: of the file.
        dataset: what the file must call itself; his three files look alike.
        folders: where it is looked for, relative to the data root, in order.
        key: the field that tells images apart.
    """

    name: str
    dataset: str
    folders: tuple[str, ...]
    key: str

    def path(self, root: Path) -> Path:
        """Return the file's place.

        Raises:
            InputError: it is not there; every place looked at is listed.
        """
        return find(root, self.folders, self.name)

    def records(self, root: Path, parts: Sequence[str]) -> Iterator[tuple[dict[str, object], str]]:
        """Yield the records of the images in `parts`, and what a message calls each.

        Raises:
            InputError: no such file, damaged, of another data set, with an image twice or a part of another name.
        """
        path = self.path(root)
        file = RecordFile(path, ["images"])
        seen: set[int | str] = set()
        for _, _, record in file:
            key = field(record, self.key, (int, str), file.where)
            if key in seen:
                raise InputError(f"{self.key} {printable(key)} stands twice in the file", where=file.where())
            seen.add(key)
            part = field(record, "split", str, file.where)
            if part in parts:
                yield record, file.where()
            elif part not in _KNOWN_PARTS:
                raise InputError(f"'split' is '{part}'", where=file.where(), way_out=nearest(part, _KNOWN_PARTS))
        dataset = file.header.get("dataset", self.dataset)
        if dataset != self.dataset:
            way_out = f"Karpathy's three files look alike; take {self.name}"
            raise InputError(f"'dataset' is {dataset!r}, '{self.dataset}' is needed", where=str(path), way_out=way_out)


def references(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return an image's captions as they were typed.

    Raises:
        InputError: there is none, or one has another shape.
    """
    captions = tuple(
        field(sentence, "raw", str, f"{where}, sentence {number}")
        for number, sentence in enumerate(field(record, "sentences", list, where))
    )
    if not captions:
        raise InputError("the image has no caption", where=where, way_out="Get the file again")
    return captions


@dataclass(frozen=True)
class KarpathyTask(Task):
    """Captions from one of the files; what a record's id is and where its image lies is the data set's own.

    Attributes:
        file: which of them.
        splits: which of its parts are the splits; one of `PARTS`.
    """

    file: ClassVar[SplitFile]
    splits: str = "karpathy"

    @abstractmethod
    def folder_of(self, root: Path) -> Callable[[Mapping[str, Any], str], str]:
        """Return what gives a record's folder of images below the data root, from it and what a message calls it.

        Raises:
            InputError: there is none; every place looked at is listed.
        """

    @abstractmethod
    def identity(self, record: Mapping[str, Any], file_name: str, where: str) -> tuple[SampleId, dict[str, object]]:
        """Return a record's id and the `Sample.meta` of it."""

    def with_splits(self, name: str) -> Self:
        """Return the task on other parts of the file; `official` changes nothing."""
        if name == "official":
            return self
        if name not in PARTS:
            raise self._unknown_splits(name, list(PARTS))
        return replace(self, splits=name)

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the one file that holds every split."""
        del split
        return (self.file.path(root),)

    def index(self, root: Path, split: Split) -> Iterator[IndexEntry]:
        """Yield id and image of every sample; see `Task.index`."""
        for sample in self.read(root, split):
            yield IndexEntry(sample.sample_id, (sample.images[0].path,))

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        wanted = None if only is None else set(only)
        folder_of = self.folder_of(root)
        for record, place in self.file.records(root, PARTS[self.splits][split]):
            sample = self._sample(record, place, folder_of(record, place))
            if wanted is None or sample.sample_id in wanted:
                yield sample

    def _sample(self, record: Mapping[str, Any], where: str, folder: str) -> Sample:
        name = plain_file_name(field(record, "filename", str, where), where)
        sample_id, meta = self.identity(record, name, where)
        return caption_sample(self.name, sample_id, f"{folder}/{name}", references(record, where), meta)
