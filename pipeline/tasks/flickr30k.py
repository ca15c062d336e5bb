"""Flickr30k in Karpathy's split: 29,000 training and 1,000 test images with five captions each.

`dataset_flickr30k.json` and the archive's folder of images; a sample's id is the number in its file name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.data.files import RecordFile, field, find
from pipeline.data.sample import ImageRef, Sample
from pipeline.errors import InputError
from pipeline.tasks import tasks
from pipeline.tasks.base import Entry, Normalise, PromptTemplate, SampleId, Score, Split, Task
from pipeline.tasks.caption_files import CAPTION_TEMPLATE, cider_score, one_line, plain_file_name

KARPATHY_SPLITS: Mapping[Split, str] = {"train": "train", "evaluation": "test"}
FILE_FOLDERS = ("flickr30k", ".")
IMAGE_PARENTS = ("flickr30k", "images", "flickr30k_images", ".")
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images")


@dataclass(frozen=True)
class Flickr30k(Task):
    """Captions of Flickr photographs; training on Karpathy's `train`, evaluation on his `test`."""

    name: str = "flickr30k"
    stands_for: str = "flickr30k"
    template: PromptTemplate = CAPTION_TEMPLATE
    max_new_tokens: int = 20
    metric: str = "CIDEr"
    unit: Literal["percent", "fraction"] = "fraction"

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the one file that holds every split."""
        del split
        return (find(root, FILE_FOLDERS, "dataset_flickr30k.json"),)

    def index(self, root: Path, split: Split) -> Iterator[Entry]:
        """Yield id and image of every sample; see `Task.index`."""
        for sample in self.read(root, split):
            yield Entry(sample.sample_id, (sample.images[0].path,))

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        wanted = None if only is None else set(only)
        folder = self._image_folder(root)
        (path,) = self.files(root, split)
        file = RecordFile(path, ["images"])
        for _, _, record in file:
            if field(record, "split", str, file.where) != KARPATHY_SPLITS[split]:
                continue
            sample = self._sample(record, file.where(), folder)
            if wanted is None or sample.sample_id in wanted:
                yield sample
        dataset = file.header.get("dataset", "flickr30k")
        if dataset != "flickr30k":
            raise InputError(
                f"'dataset' is '{dataset}', 'flickr30k' is needed",
                where=str(path),
                way_out="Karpathy's three files look alike; take dataset_flickr30k.json",
            )

    def score(
        self, samples: Sequence[Sample], predictions: Mapping[SampleId, str], *, normalise: Normalise = "always"
    ) -> Score:
        """Score by CIDEr-D over the samples together; see `cider_score`."""
        return cider_score(self, samples, predictions)

    def _sample(self, record: Mapping[str, Any], where: str, folder: str) -> Sample:
        name = plain_file_name(field(record, "filename", str, where), where)
        stem = name.rsplit(".", 1)[0]
        references = tuple(
            field(sentence, "raw", str, f"{where}, sentence {number}")
            for number, sentence in enumerate(field(record, "sentences", list, where))
        )
        if not references:
            raise InputError("the image has no caption", where=f"{where} ('{name}')", way_out="Get the file again")
        return Sample(
            task=self.name,
            sample_id=int(stem) if stem.isdecimal() else stem,
            images=(ImageRef(f"{folder}/{name}"),),
            question=None,
            target=one_line(references[0]),
            references=references,
            meta={"file_name": name},
        )

    def _image_folder(self, root: Path) -> str:
        folders = [f"{parent}/{folder}" for parent in IMAGE_PARENTS for folder in IMAGE_FOLDERS]
        # The original archive has the pictures in one level, the Kaggle copy in two of the same name.
        folders = [f"{folder}/{folder.rsplit('/', 1)[-1]}" for folder in folders] + folders + ["flickr30k/images"]
        return find(root, folders, ".").relative_to(root).as_posix()


FLICKR30K = Flickr30k()
tasks.add(FLICKR30K.name, FLICKR30K)
