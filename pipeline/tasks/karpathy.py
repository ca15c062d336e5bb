"""Karpathy's split files (cs.stanford.edu/people/karpathy/deepimagesent): one file with every split and all captions.

`dataset_coco.json` divides COCO 2014 anew: train 82,783, restval 30,504, val 5,000 and test 5,000 images, where all but
train lie in `val2014`. `dataset_flickr30k.json` has train 29,000, val 1,014 and test 1,000.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.files import RecordFile, field, find
from pipeline.errors import InputError, nearest
from pipeline.tasks.base import Split

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

    def records(self, root: Path, parts: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
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
                raise InputError(f"{self.key} {key} stands twice in the file", where=file.where())
            seen.add(key)
            part = field(record, "split", str, file.where)
            if part in parts:
                yield record, file.where()
            elif part not in _KNOWN_PARTS:
                raise InputError(f"'split' is '{part}'", where=file.where(), way_out=nearest(part, _KNOWN_PARTS))
        dataset = file.header.get("dataset", self.dataset)
        if dataset != self.dataset:
            raise InputError(
                f"'dataset' is {dataset!r}, '{self.dataset}' is needed",
                where=str(path),
                way_out=f"Karpathy's three files look alike; take {self.name}",
            )


def references(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return an image's captions as they were typed.

    Raises:
        InputError: there is none, or one has another shape.
    """
    found = tuple(
        field(sentence, "raw", str, f"{where}, sentence {number}")
        for number, sentence in enumerate(field(record, "sentences", list, where))
    )
    if not found:
        raise InputError("the image has no caption", where=where, way_out="Get the file again")
    return found
