"""COCO 2014 captions (cocodataset.org): 82,783 training and 40,504 validation images, or Karpathy's splits of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pipeline.data.files import field
from pipeline.tasks import tasks
from pipeline.tasks.base import SampleId, Task, image_folder
from pipeline.tasks.caption_files import CaptionTask, plain_file_name
from pipeline.tasks.karpathy import KarpathyTask, SplitFile

FOLDERS = ("coco/annotations", "annotations", "coco", ".")


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
