"""MME: two yes-or-no questions on each of 1,187 images, 14 subtasks; no training split of its own.

Read from the release's folders (both layouts: pictures beside the questions, or in `images/` and
`questions_answers_YN/`) or from the Parquet shards of its Hub copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.data.files import field, find
from pipeline.data.parquet import cell_name, rows
from pipeline.data.sample import ImageRef, Sample
from pipeline.errors import InputError
from pipeline.tasks import tasks
from pipeline.tasks.base import Entry, Normalise, PromptTemplate, SampleId, Score, Split, Task
from pipeline.tasks.choice_files import accuracy

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
FOLDERS = tuple(
    f"{parent}{release}"
    for parent in ("mme/", "MME/", "")
    for release in (
        "MME_Benchmark_release_version/MME_Benchmark",
        "MME_Benchmark_release_version",
        "MME_Benchmark",
        ".",
    )
)
SHARD_FOLDERS = ("mme/data", "mme", "MME/data", "MME")
_PICTURES = (".jpg", ".png", ".jpeg")

MME_TEMPLATE = PromptTemplate(
    prefix='Instruction: provide an answer in "Yes" or "No" to the question. Use the image to answer.\n',
    prefix_needs_demos=False,
    query="Image: {image} Question: {question} Answer:",
    answer=" {answer}\n",
    stop_words=("Question", "Answer", "Image"),
)


def yes_or_no(answer: str) -> str:
    """Return "yes", "no" or "other" as MME's own tool reads an answer: by its first four characters."""
    start = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


@dataclass(frozen=True)
class Mme(Task):
    """Yes-or-no questions; every split comes from the one test set, an image's two questions together."""

    name: str = "mme"
    stands_for: str = "mme"
    template: PromptTemplate = MME_TEMPLATE
    max_new_tokens: int = 10
    metric: str = "accuracy"
    unit: Literal["percent", "fraction"] = "percent"
    one_pool: bool = True

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the shards, or else every text file of questions."""
        del split
        shards = self._shards(root)
        return shards or tuple(text for _, _, text in self._texts(root))

    def index(self, root: Path, split: Split) -> Iterator[Entry]:
        """Yield id and image of every sample; see `Task.index`."""
        for sample in self.read(root, split):
            yield Entry(sample.sample_id, (sample.images[0].path,), f"{sample.meta['category']}/{sample.meta['image']}")

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`. An id is `<subtask>/<image>#<0 or 1>`."""
        del split
        wanted = None if only is None else set(only)
        for sample in self._from_shards(root) if self._shards(root) else self._from_folders(root):
            if wanted is None or sample.sample_id in wanted:
                yield sample

    def score(
        self, samples: Sequence[Sample], predictions: Mapping[SampleId, str], *, normalise: Normalise = "always"
    ) -> Score:
        """Score by accuracy; `details` has MME's accuracy+ (both questions of an image right) and subtask scores.

        A subtask's score is 100 accuracy + 100 accuracy+ (at most 200); perception and cognition are sums.
        """
        answers = self.predictions_for(samples, predictions)
        per_sample: dict[SampleId, float] = {}
        pairs: dict[str, dict[str, list[float]]] = {}
        for sample, answer in zip(samples, answers, strict=True):
            per_sample[sample.sample_id] = 100.0 * (yes_or_no(answer) == sample.references[0].lower())
            images = pairs.setdefault(str(sample.meta["category"]), {})
            images.setdefault(str(sample.meta["image"]), []).append(per_sample[sample.sample_id])
        score = accuracy(self, samples, per_sample, "category")
        plus = {name: sum(100.0 * (min(got) > 0) for got in images.values()) / len(images)
                for name, images in sorted(pairs.items())}  # fmt: skip
        subtasks = {name: score.details["per_category"][name] + plus[name] for name in plus}
        score.details.update(
            accuracy_plus=sum(100.0 * (min(got) > 0) for images in pairs.values() for got in images.values())
            / sum(len(images) for images in pairs.values()),
            accuracy_plus_per_category=plus,
            score_per_category=subtasks,
            perception=sum(subtasks.get(name, 0.0) for name in PERCEPTION),
            cognition=sum(subtasks.get(name, 0.0) for name in COGNITION),
        )
        return score

    def _shards(self, root: Path) -> tuple[Path, ...]:
        found = (sorted((root / folder).glob("test-*.parquet")) for folder in SHARD_FOLDERS)
        return tuple(next((shards for shards in found if shards), []))

    def _from_shards(self, root: Path) -> Iterator[Sample]:
        asked: dict[str, int] = {}
        for shard in self._shards(root):
            for row, record in rows(shard, ["question_id", "question", "answer", "category"]):
                where = f"{shard}: row {row}"
                key = field(record, "question_id", str, where)
                number = asked[key] = asked.get(key, -1) + 1
                path = cell_name(shard.relative_to(root).as_posix(), row, "image")
                category, image = field(record, "category", str, where), key.split("/", 1)[-1]
                question, answer = field(record, "question", str, where), field(record, "answer", str, where)
                yield self._sample(category, image, number, path, question, answer, where)

    def _texts(self, root: Path) -> Iterator[tuple[str, Path, Path]]:
        """Yield subtask, folder of pictures and text file of every image."""
        for subtask in (*PERCEPTION, *COGNITION):
            folder = find(root, FOLDERS, subtask)
            questions, pictures = folder / "questions_answers_YN", folder / "images"
            if not (questions.is_dir() and pictures.is_dir()):
                questions = pictures = folder
            for text in sorted(questions.glob("*.txt")):
                if not text.name.startswith("."):
                    yield subtask, pictures, text

    def _from_folders(self, root: Path) -> Iterator[Sample]:
        for subtask, pictures, text in self._texts(root):
            candidates = [pictures / (text.stem + suffix) for suffix in _PICTURES]
            # A missing picture keeps its likely name, so that the draw lists it with all the others.
            picture = next((path for path in candidates if path.exists()), candidates[0])
            try:
                lines = [line for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot be read ({error})", where=str(text), way_out="Get the file again") from error
            if len(lines) != 2 or any(line.count("\t") != 1 for line in lines):
                raise InputError(
                    f"has {len(lines)} lines, or a line without exactly one tab",
                    where=str(text),
                    way_out="The official files have two lines 'question<TAB>Yes' and 'question<TAB>No'",
                )
            for number, line in enumerate(lines):
                question, answer = line.split("\t")
                path = picture.relative_to(root).as_posix()
                yield self._sample(subtask, picture.name, number, path, question, answer, f"{text}: line {number + 1}")

    def _sample(
        self, category: str, image: str, number: int, path: str, question: str, answer: str, where: str
    ) -> Sample:
        answer = answer.strip().capitalize()
        if answer not in {"Yes", "No"}:
            raise InputError(
                f"the answer is '{answer}', Yes or No is needed", where=where, way_out="Get the file again"
            )
        return Sample(
            task=self.name,
            sample_id=f"{category}/{image}#{number}",
            images=(ImageRef(path),),
            question=question.strip(),
            target=answer,
            references=(answer,),
            meta={"category": category, "image": image},
        )


MME = Mme()
tasks.add(MME.name, MME)
