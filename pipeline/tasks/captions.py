"""Captions: COCO's own split, Karpathy's splits of COCO 2014, and Flickr30k.

COCO 2014 (cocodataset.org) has 82,783 training and 40,504 validation images. Karpathy's split files
(cs.stanford.edu/people/karpathy/deepimagesent) hold every split and all captions in one file: `dataset_coco.json`
divides COCO 2014 anew into train 82,783, restval 30,504, val 5,000 and test 5,000 images, where all but train lie in
`val2014`; `dataset_flickr30k.json` has train 29,000, val 1,014 and test 1,000 images with five captions each. An id
in Flickr30k is the number in its file name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pipeline.core.errors import InputError, nearest
from pipeline.data.official import RecordFile, field, find
from pipeline.data.sample import Sample
from pipeline.scores.chair import MINIATURE_WORDS
from pipeline.scores.files import printable
from pipeline.tasks import IndexEntry, PromptTemplate, SampleId, Score, Split, Task, image_folder, tasks
from pipeline.tasks.caption_files import CAPTION_TEMPLATE, CaptionTask, caption_sample, cider_score, plain_file_name

FOLDERS = ("coco/annotations", "annotations", "coco", ".")
IMAGE_PARENTS = ("flickr30k", "images", "flickr30k_images", ".")
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images")
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


@dataclass(frozen=True)
class CocoCaptions(CaptionTask):
    """COCO's own split."""

    def with_splits(self, name: str) -> Task:
        """Return the task on Karpathy's parts; see `PARTS`."""
        if name == "official":
            return self
        settings = {setting.name: getattr(self, setting.name) for setting in fields(CaptionTask)}
        return KarpathyCoco(**settings).with_splits(name)


@dataclass(frozen=True)
class KarpathyCoco(KarpathyTask, CaptionTask):
    """The same images and captions, divided by Karpathy's file. Objects are still read from COCO's own."""

    file: ClassVar[SplitFile] = SplitFile("dataset_coco.json", "coco", ("coco", *FOLDERS[:2], "."), "cocoid")

    def folder_of(self, root: Path) -> Callable[[Mapping[str, Any], str], str]:
        """Return the look-up of a record's `filepath`, such as `val2014`."""
        folder = cache(lambda subset: image_folder(root, subset))
        return lambda record, where: folder(plain_file_name(field(record, "filepath", str, where), where))

    def identity(self, record: Mapping[str, Any], file_name: str, where: str) -> tuple[SampleId, dict[str, object]]:
        """Return COCO's image id, as `CaptionTask` does."""
        image_id = field(record, "cocoid", int, where)
        return image_id, {"image_id": image_id, "file_name": file_name}


COCO = CocoCaptions(name="coco", stands_for="coco", folders=FOLDERS, official_evaluation=40_504)
tasks.register(COCO)
tasks.register(replace(COCO, name="mini-coco", object_words=MINIATURE_WORDS, official_evaluation=None))  # the miniature


@dataclass(frozen=True)
class Flickr30k(KarpathyTask):
    """Captions of Flickr photographs; the data set is only divided as Karpathy did it."""

    name: str = "flickr30k"
    stands_for: str = "flickr30k"
    template: PromptTemplate = CAPTION_TEMPLATE
    max_new_tokens: int = 20
    metric: str = "CIDEr"
    unit: Literal["percent", "fraction"] = "fraction"
    file: ClassVar[SplitFile] = SplitFile("dataset_flickr30k.json", "flickr30k", ("flickr30k", "."), "filename")

    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Score by CIDEr-D over the samples together; see `cider_score`."""
        return cider_score(self, samples, predictions)

    def folder_of(self, root: Path) -> Callable[[Mapping[str, Any], str], str]:
        """Return the one folder of all images."""
        folders = [f"{parent}/{folder}" for parent in IMAGE_PARENTS for folder in IMAGE_FOLDERS]
        # The original archive has the pictures in one level, the Kaggle copy in two of the same name.
        folders = [f"{folder}/{folder.rsplit('/', 1)[-1]}" for folder in folders] + folders + ["flickr30k/images"]
        images = find(root, folders, ".").relative_to(root).as_posix()
        return lambda record, where: images

    def identity(self, record: Mapping[str, Any], file_name: str, where: str) -> tuple[SampleId, dict[str, object]]:
        """Return the number in the file name."""
        stem = file_name.rsplit(".", 1)[0]
        return int(stem) if stem.isdecimal() else stem, {"file_name": file_name}


FLICKR30K = Flickr30k()
tasks.register(FLICKR30K)
