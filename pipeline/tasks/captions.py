"""COCO captions and Flickr30k: where their files lie, and Karpathy's splits of both.

COCO 2014 (cocodataset.org) has 82,783 training and 40,504 validation images, or Karpathy's splits of them. Flickr30k is
divided by Karpathy alone: 29,000 training, 1,014 validation and 1,000 test images with five captions each, in
`dataset_flickr30k.json` and the archive's folder of images; a sample's id is the number in its file name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipeline.data.files import field, find
from pipeline.data.sample import Sample
from pipeline.tasks import tasks
from pipeline.tasks.base import PromptTemplate, SampleId, Score, Task, image_folder
from pipeline.tasks.caption_files import CAPTION_TEMPLATE, CaptionTask, cider_score, plain_file_name
from pipeline.tasks.karpathy import KarpathyTask, SplitFile

FOLDERS = ("coco/annotations", "annotations", "coco", ".")
IMAGE_PARENTS = ("flickr30k", "images", "flickr30k_images", ".")
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images")


@dataclass(frozen=True)
class CocoCaptions(CaptionTask):
    """COCO's own split."""

    def with_splits(self, name: str) -> Task:
        """Return the task on Karpathy's parts; see `karpathy.PARTS`."""
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
