"""Open-ended VQA in the official files: VQAv2, OK-VQA, and the shape that the miniature's have too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import InputError
from pipeline.data.official import RecordFile, field, find
from pipeline.data.sample import ImageRef, Sample
from pipeline.scores.vqa import stem_answer, vqa_accuracy
from pipeline.tasks import IndexEntry, PromptTemplate, SampleId, Score, Split, Task, image_folder, shown_ids, tasks

VQA_TEMPLATE = PromptTemplate(
    prefix="Instruction: provide an answer to the question. Use the image to answer.\n",
    prefix_needs_demos=False,
    query="Image: {image} Question: {question} Answer:",
    answer=" {answer}\n",
    stop_words=("Question", "Answer", "Image"),
    instruction="Provide an answer to the question. Use the image to answer.",
)
Normalise = Literal["always", "official"]
SUBSETS: Mapping[Split, str] = {"train": "train2014", "evaluation": "val2014"}
NUM_ANSWERS = 10


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent answer; of several, the one that appears first (so no hash seed matters)."""
    counts = Counter(answers)  # keeps the order of first appearance, and max takes the first of equals
    return max(counts, key=counts.__getitem__)


@dataclass(frozen=True)
class VqaTask(Task):
    """VQA from a questions file and an annotations file, joined on the question id.

    Attributes:
        folders: where the two files are looked for, relative to the data root, in order.
        questions, annotations: file names, with `{subset}` for `train2014` or `val2014`.
        image: name of an image file, with `{subset}` and `{image_id}`.
        stemmed_references: the references are stems (`scores.vqa`), so that predictions may be brought to that form.
        normalise: normalise every answer, or only where the ten differ.
        stem_predictions: compare the predictions' stems, for references that are stems.
    """

    name: str
    stands_for: str
    folders: tuple[str, ...]
    questions: str
    annotations: str
    image: str = "COCO_{subset}_{image_id:012d}.jpg"
    template: PromptTemplate = VQA_TEMPLATE
    max_new_tokens: int = 10
    metric: str = "accuracy"
    unit: Literal["percent", "fraction"] = "percent"
    stemmed_references: bool = False
    normalise: Normalise = "always"
    stem_predictions: bool = False
    official_evaluation: int | None = None

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the files of `split`; see `Task.files`."""
        return self._questions_path(root, split), self._annotations_path(root, split)

    def index(self, root: Path, split: Split) -> Iterator[IndexEntry]:
        """Yield id and image of every sample; see `Task.index`."""
        folder = image_folder(root, SUBSETS[split])
        images: dict[int, tuple[str, ...]] = {}  # one tuple an image, shared by its questions
        for sample_id, image_id, _ in self._read_questions(root, split):
            if image_id not in images:
                images[image_id] = (self._image(folder, split, image_id),)
            yield IndexEntry(sample_id, images[image_id])

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        wanted = None if only is None else set(only)
        questions: dict[int, tuple[int, str]] = {}
        unanswered: dict[int, None] = {}  # a set that keeps the file's order
        for question_id, image_id, question in self._read_questions(root, split):
            unanswered[question_id] = None
            if wanted is None or question_id in wanted:
                questions[question_id] = (image_id, question)
        order = list(questions)
        folder = image_folder(root, SUBSETS[split])
        path = self._annotations_path(root, split)
        samples: dict[int, Sample] = {}
        file = RecordFile(path, ["annotations"], expect={"data_subtype": SUBSETS[split]})
        for _, _, record in file:
            question_id = field(record, "question_id", int, file.where)
            unanswered.pop(question_id, None)
            if question_id not in questions:
                continue
            if question_id in samples:
                raise InputError(f"question_id {question_id} has two annotations", where=file.where())
            image_id, question = questions[question_id]
            image = self._image(folder, split, image_id)
            samples[question_id] = self._sample(record, file.where(), question, image, image_id)
        if unanswered:
            missing = list(unanswered)
            raise InputError(
                f"{len(missing)} question(s) of '{self._questions_path(root, split).name}' have no annotation: "
                f"question_id {shown_ids(missing)}",
                where=str(path),
                way_out="Questions and annotations must be of the same release and split; get both again",
            )
        for question_id in order:
            yield samples[question_id]

    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Score by VQA accuracy; the papers' figures come from `normalise: always`."""
        answers = self.predictions_for(samples, predictions)
        if self.stem_predictions:
            answers = [stem_answer(answer) for answer in answers]
        result = vqa_accuracy(
            {sample.sample_id: answer for sample, answer in zip(samples, answers, strict=True)},
            {sample.sample_id: sample.references for sample in samples},
            normalise=self.normalise,
            answer_types={s.sample_id: s.meta["answer_type"] for s in samples if "answer_type" in s.meta},
        )
        return Score(
            result.overall, self.metric, dict(result.per_question), {"per_answer_type": result.per_answer_type}
        )

    def _sample(self, record: Mapping[str, Any], where: str, question: str, image: str, image_id: int) -> Sample:
        place = f"{where} (question_id {record['question_id']})"
        if field(record, "image_id", int, place) != image_id:
            raise InputError(
                f"image_id is {record['image_id']}, the question's is {image_id}",
                where=place,
                way_out="Questions and annotations must be of the same release; get both again",
            )
        answers = tuple(
            field(_object(answer, place), "answer", str, f"{place}, answer {number}")
            for number, answer in enumerate(field(record, "answers", list, place))
        )
        if len(answers) != NUM_ANSWERS:
            raise InputError(
                f"has {len(answers)} answers, the official files have {NUM_ANSWERS}",
                where=place,
                way_out="VQA accuracy is defined on ten; get the official annotations",
            )
        extras = {key: record[key] for key in ("answer_type", "question_type") if key in record}
        return Sample(
            task=self.name,
            sample_id=record["question_id"],
            images=(ImageRef(image),),
            question=question,
            target=most_frequent(answers),
            references=answers,
            meta={"image_id": image_id, **extras},
        )

    def _read_questions(self, root: Path, split: Split) -> Iterator[tuple[int, int, str]]:
        path = self._questions_path(root, split)
        seen: set[int] = set()
        file = RecordFile(path, ["questions"], expect={"data_subtype": SUBSETS[split]})
        for _, _, record in file:
            question_id = field(record, "question_id", int, file.where)
            if question_id in seen:
                raise InputError(f"question_id {question_id} stands twice in the file", where=file.where())
            seen.add(question_id)
            yield question_id, field(record, "image_id", int, file.where), field(record, "question", str, file.where)

    def _questions_path(self, root: Path, split: Split) -> Path:
        return find(root, self.folders, self.questions.format(subset=SUBSETS[split]))

    def _annotations_path(self, root: Path, split: Split) -> Path:
        return find(root, self.folders, self.annotations.format(subset=SUBSETS[split]))

    def _image(self, folder: str, split: Split, image_id: int) -> str:
        return f"{folder}/{self.image.format(subset=SUBSETS[split], image_id=image_id)}"


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"an answer is {value!r}, an object is needed", where=where)
    return value


# visualqa.org: 443,757 training and 214,354 validation questions on COCO 2014 images
VQAV2 = VqaTask(
    name="vqav2",
    stands_for="vqav2",
    folders=("vqav2", "VQAv2", "."),
    questions="v2_OpenEnded_mscoco_{subset}_questions.json",
    annotations="v2_mscoco_{subset}_annotations.json",
    official_evaluation=214_354,
)
tasks.register(VQAV2)

# okvqa.allenai.org: 9,009 training and 5,046 test questions on COCO 2014 images. References and target are the `answer`
# field (stemmed in release 1.0 and, otherwise, in 1.1), as in the official score; `raw_answer`, the typed text, is not
# used
OKVQA = VqaTask(
    name="okvqa",
    stands_for="okvqa",
    folders=("okvqa", "ok_vqa", "OK-VQA", "."),
    questions="OpenEnded_mscoco_{subset}_questions.json",
    annotations="mscoco_{subset}_annotations.json",
    official_evaluation=5_046,
    stemmed_references=True,
)
tasks.register(OKVQA)

# the miniature's: the same file names and shapes, images in PNG, made-up words
_PNG = "COCO_{subset}_{image_id:012d}.png"
tasks.register(replace(VQAV2, name="mini-vqa", image=_PNG, official_evaluation=None))
tasks.register(replace(OKVQA, name="mini-okvqa", image=_PNG, stemmed_references=False, official_evaluation=None))
