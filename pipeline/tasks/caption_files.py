"""Captioning in the official COCO caption files (COCO 2014, and the miniature's, which have the same shape)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.errors import InputError
from pipeline.data.official import RecordFile, field, find, source_digest
from pipeline.data.sample import ImageRef, Sample
from pipeline.scores.files import need
from pipeline.tasks import IndexEntry, PromptTemplate, SampleId, Score, Split, Task, image_folder, shown_ids
from pipeline.tasks.vqa import SUBSETS

if TYPE_CHECKING:
    from pipeline.scores.chair import ChairScore

CAPTION_TEMPLATE = PromptTemplate(
    prefix="Instruction: provide a short caption of the input image.\n",
    prefix_needs_demos=True,
    query="Image: {image} Caption:",
    answer=" {answer}\n",
    stop_words=("Caption", "Image"),
    instruction="provide a short caption of the input image.",
    cue="Caption",
)


def one_line(caption: str) -> str:
    """Return the caption on one line, edge spaces off (0.3 % of COCO's hold a newline, 14 % an edge space)."""
    return " ".join(caption.split())


def caption_sample(
    task: str, sample_id: SampleId, image: str, captions: tuple[str, ...], meta: Mapping[str, Any]
) -> Sample:
    """Return the sample of one captioned image; the first caption is trained, all are references."""
    return Sample(
        task=task,
        sample_id=sample_id,
        images=(ImageRef(image),),
        question=None,
        target=one_line(captions[0]),
        references=captions,
        meta=dict(meta),
    )


def cider_score(task: Task, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
    """Score by CIDEr-D over the given samples together, as a fraction.

    Document frequencies come from the references of these samples alone, so a part scored by itself gives
    another number (one image alone gives exactly 0).
    """
    from pipeline.scores.caption import caption_scores

    captions = task.predictions_for(samples, predictions)
    result = caption_scores(
        {sample.sample_id: caption for sample, caption in zip(samples, captions, strict=True)},
        {sample.sample_id: sample.references for sample in samples},
        ("CIDEr",),
    )
    per_image = {key: values["CIDEr"] for key, values in result.per_image.items()}
    return Score(result.overall["CIDEr"], task.metric, per_image, {"num_images": len(samples)})


@dataclass(frozen=True)
class CaptionTask(Task):
    """Captions from one COCO caption file a split; a sample is an image, its id the image id.

    Attributes:
        folders: where the file is looked for, relative to the data root, in order.
        captions: file name, with `{subset}` for `train2014` or `val2014`.
        instances: likewise; only CHAIR reads it.
        object_words: file of the words that name its categories; None for COCO's.
    """

    name: str
    stands_for: str
    folders: tuple[str, ...]
    captions: str = "captions_{subset}.json"
    instances: str = "instances_{subset}.json"
    object_words: Path | None = None
    template: PromptTemplate = CAPTION_TEMPLATE
    max_new_tokens: int = 20
    metric: str = "CIDEr"
    unit: Literal["percent", "fraction"] = "fraction"
    official_evaluation: int | None = None

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the files of `split`; see `Task.files`."""
        return (find(root, self.folders, self.captions.format(subset=SUBSETS[split])),)

    def object_file(self, root: Path, split: Split) -> Path:
        """Return the instances file: with the reference captions, CHAIR's ground truth of what an image shows.

        Raises:
            InputError: it is not there; every place looked at is listed.
        """
        return find(root, self.folders, self.instances.format(subset=SUBSETS[split]))

    def chair(
        self, root: Path, split: Split, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
    ) -> ChairScore:
        """Return CHAIR of captions by image id, as text, and the reference captions of the same images.

        Raises:
            InputError: there is no instances file, it is damaged, or it does not hold these images.
        """
        from pipeline.scores import chair  # needs NLTK; reading and training do not

        path = self.object_file(root, split)
        categories = chair.categories_of([path])
        way_out = "Get the instances of the same split"
        need(predictions, categories, "an entry", where=str(path), way_out=way_out)
        words = None if self.object_words is None else chair.synonyms(self.object_words)
        truth = chair.ground_truth({key: categories[key] for key in predictions}, references, words)
        return chair.chair_scores(predictions, truth, words)

    def complete(
        self, score: Score, samples: Sequence[Sample], predictions: Mapping[SampleId, str], root: Path, split: Split
    ) -> Score:
        """Add CHAIRs, CHAIRi and recall, fractions, where the objects of the images are annotated."""
        keys = {str(sample.sample_id): sample for sample in samples}
        try:
            chair = self.chair(
                root,
                split,
                {key: predictions[sample.sample_id] for key, sample in keys.items()},
                {key: sample.references for key, sample in keys.items()},
            )
        except InputError as error:
            # The captions were generated and have their score; only this figure lacks its file.
            return replace(score, details={**score.details, "left_out": [f"{self.name}: no CHAIR: {error}"]})
        path = self.object_file(root, split)
        made_from = {path.relative_to(root).as_posix(): source_digest(path)}
        return replace(
            score,
            metrics={**score.metrics, "CHAIRs": chair.CHAIRs, "CHAIRi": chair.CHAIRi, "recall": chair.recall},
            details={**score.details, "chair": {"variant": chair.variant, "objects": made_from}},
            wrong_words={
                keys[sentence.image_id].sample_id: [word for word, _ in sentence.mscoco_hallucinated_words]
                for sentence in chair.sentences
            },
        )

    def index(self, root: Path, split: Split) -> Iterator[IndexEntry]:
        """Yield id and image of every sample; see `Task.index`."""
        folder = image_folder(root, SUBSETS[split])
        for image_id, file_name in self._images_and_captions(root, split, only=())[0].items():
            yield IndexEntry(image_id, (f"{folder}/{file_name}",))

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        folder = image_folder(root, SUBSETS[split])
        files, captions = self._images_and_captions(root, split, only)
        for image_id, file_name in files.items():
            if image_id not in captions:
                continue
            meta = {"image_id": image_id, "file_name": file_name}
            yield caption_sample(self.name, image_id, f"{folder}/{file_name}", tuple(captions[image_id]), meta)

    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Score by CIDEr-D over the samples together; see `cider_score`."""
        return cider_score(self, samples, predictions)

    def _images_and_captions(
        self, root: Path, split: Split, only: Collection[SampleId] | None
    ) -> tuple[dict[int, str], dict[int, list[str]]]:
        """Return the file name of every image, and the captions of the images in `only` (None: all)."""
        (path,) = self.files(root, split)
        wanted = None if only is None else set(only)
        files: dict[int, str] = {}
        captions: dict[int, list[str]] = {}
        captioned: set[int] = set()
        file = RecordFile(path, ["images", "annotations"])
        for list_name, _, record in file:
            if list_name == "images":
                image_id = field(record, "id", int, file.where)
                if image_id in files:
                    raise InputError(f"image id {image_id} stands twice in the file", where=file.where())
                name = field(record, "file_name", str, file.where)
                files[image_id] = _file_name(name, SUBSETS[split], file.where)
            else:
                image_id = field(record, "image_id", int, file.where)
                caption = field(record, "caption", str, file.where)
                captioned.add(image_id)
                if wanted is None or image_id in wanted:
                    captions.setdefault(image_id, []).append(caption)
        missing = [image_id for image_id in files if image_id not in captioned]
        if missing:
            raise InputError(
                f"{len(missing)} image(s) have no caption: image id {shown_ids(missing)}",
                where=str(path),
                way_out="Every image of the official file has at least five; get it again",
            )
        return files, captions


def _file_name(name: str, subset: str, where: Callable[[], str]) -> str:
    if name.startswith("COCO_") and not name.startswith(f"COCO_{subset}_"):
        way_out = "Were the train and the val file swapped or renamed?"
        raise InputError(f"file_name '{name}' is of another split than {subset}", where=where(), way_out=way_out)
    return plain_file_name(name, where())


def plain_file_name(name: str, where: str) -> str:
    """Return `name`, checked not to lead out of the folder of images."""
    if any(character in name for character in "/\\\0") or name in {"", ".", ".."}:
        raise InputError(f"file name {name!r} is no plain file name", where=where, way_out="Get the file again")
    return name
