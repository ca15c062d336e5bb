"""COCO 2014 captions (cocodataset.org): 82,783 training and 40,504 validation images, or Karpathy's splits of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.data.files import field
from pipeline.data.sample import ImageRef, Sample
from pipeline.tasks import tasks
from pipeline.tasks.base import Entry, SampleId, Split, Task, image_folder
from pipeline.tasks.caption_files import CaptionTask, one_line, plain_file_name
from pipeline.tasks.karpathy import PARTS, SplitFile, references

FOLDERS = ("coco/annotations", "annotations", "coco", ".")
FILE = SplitFile("dataset_coco.json", "coco", ("coco", *FOLDERS[:2], "."), "cocoid")


@dataclass(frozen=True)
class CocoCaptions(CaptionTask):
    """COCO's own split."""

    def with_splits(self, name: str) -> Task:
        """Return the task on Karpathy's parts; see `karpathy.PARTS`."""
        if name == "official":
            return self
        if name not in PARTS:
            raise self._unknown_splits(name, list(PARTS))
        own = {one.name: getattr(self, one.name) for one in fields(CaptionTask)}
        return KarpathyCoco(**own, splits=name)


@dataclass(frozen=True)
class KarpathyCoco(CaptionTask):
    """The same images and captions, divided by Karpathy's file. Objects are still read from COCO's own.

    Attributes:
        splits: one of `karpathy.PARTS`.
    """

    splits: str = "karpathy"

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
        folders: dict[str, str] = {}
        for record, where in FILE.records(root, PARTS[self.splits][split]):
            subset = plain_file_name(field(record, "filepath", str, where), where)
            if subset not in folders:
                folders[subset] = image_folder(root, subset)
            sample = self._sample(record, where, folders[subset])
            if wanted is None or sample.sample_id in wanted:
                yield sample

    def _sample(self, record: Mapping[str, Any], where: str, folder: str) -> Sample:
        image_id = field(record, "cocoid", int, where)
        name = plain_file_name(field(record, "filename", str, where), where)
        captions = references(record, where)
        return Sample(
            task=self.name,
            sample_id=image_id,
            images=(ImageRef(f"{folder}/{name}"),),
            question=None,
            target=one_line(captions[0]),
            references=captions,
            meta={"image_id": image_id, "file_name": name},
        )


COCO = CocoCaptions(name="coco", stands_for="coco", folders=FOLDERS)
tasks.add(COCO.name, COCO)
