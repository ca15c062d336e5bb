"""Flickr30k in Karpathy's splits: 29,000 training, 1,014 validation and 1,000 test images with five captions each.

`dataset_flickr30k.json` and the archive's folder of images; a sample's id is the number in its file name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipeline.data.files import find
from pipeline.data.sample import Sample
from pipeline.tasks import tasks
from pipeline.tasks.base import PromptTemplate, SampleId, Score
from pipeline.tasks.caption_files import CAPTION_TEMPLATE, cider_score
from pipeline.tasks.karpathy import KarpathyTask, SplitFile

IMAGE_PARENTS = ("flickr30k", "images", "flickr30k_images", ".")
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images")


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
