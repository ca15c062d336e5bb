"""Flickr30k in Karpathy's splits: 29,000 training, 1,014 validation and 1,000 test images with five captions each.

`dataset_flickr30k.json` and the archive's folder of images; a sample's id is the number in its file name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.data.files import field, find
from pipeline.data.sample import ImageRef, Sample
from pipeline.tasks import tasks
from pipeline.tasks.base import Entry, Normalise, PromptTemplate, SampleId, Score, Split, Task
from pipeline.tasks.caption_files import CAPTION_TEMPLATE, cider_score, one_line, plain_file_name
from pipeline.tasks.karpathy import PARTS, SplitFile, references

FILE = SplitFile("dataset_flickr30k.json", "flickr30k", ("flickr30k", "."), "filename")
IMAGE_PARENTS = ("flickr30k", "images", "flickr30k_images", ".")
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images")


@dataclass(frozen=True)
class Flickr30k(Task):
    """Captions of Flickr photographs; the data set is only divided as Karpathy did it.

    Attributes:
        splits: which of his parts are evaluated on; see `karpathy.PARTS`.
    """

    name: str = "flickr30k"
    stands_for: str = "flickr30k"
    template: PromptTemplate = CAPTION_TEMPLATE
    max_new_tokens: int = 20
    metric: str = "CIDEr"
    unit: Literal["percent", "fraction"] = "fraction"
    splits: str = "karpathy"

    def with_splits(self, name: str) -> Task:
        """Return the task on other parts of the file; `official` is `karpathy`."""
        if name == "official":
            return self
        if name not in PARTS:
            raise self._unknown_splits(name, list(PARTS))
        return replace(self, splits=name)

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the one file that holds every split."""
        del split
        return (FILE.path(root),)

    def index(self, root: Path, split: Split) -> Iterator[Entry]:
        """Yield id and image of every sample; see `Task.index`."""
        for sample in self.read(root, split):
            yield Entry(sample.sample_id, (sample.images[0].path,))

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        wanted = None if only is None else set(only)
        folder = self._image_folder(root)
        for record, where in FILE.records(root, PARTS[self.splits][split]):
            sample = self._sample(record, where, folder)
            if wanted is None or sample.sample_id in wanted:
                yield sample

    def score(
        self, samples: Sequence[Sample], predictions: Mapping[SampleId, str], *, normalise: Normalise = "always",
        stem: bool = False,
    ) -> Score:  # fmt: skip
        """Score by CIDEr-D over the samples together; see `cider_score`."""
        return cider_score(self, samples, predictions)

    def _sample(self, record: Mapping[str, Any], where: str, folder: str) -> Sample:
        name = plain_file_name(field(record, "filename", str, where), where)
        stem = name.rsplit(".", 1)[0]
        captions = references(record, where)
        return Sample(
            task=self.name,
            sample_id=int(stem) if stem.isdecimal() else stem,
            images=(ImageRef(f"{folder}/{name}"),),
            question=None,
            target=one_line(captions[0]),
            references=captions,
            meta={"file_name": name},
        )

    def _image_folder(self, root: Path) -> str:
        folders = [f"{parent}/{folder}" for parent in IMAGE_PARENTS for folder in IMAGE_FOLDERS]
        # The original archive has the pictures in one level, the Kaggle copy in two of the same name.
        folders = [f"{folder}/{folder.rsplit('/', 1)[-1]}" for folder in folders] + folders + ["flickr30k/images"]
        return find(root, folders, ".").relative_to(root).as_posix()


FLICKR30K = Flickr30k()
tasks.add(FLICKR30K.name, FLICKR30K)
