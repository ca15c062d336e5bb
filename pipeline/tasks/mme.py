"""MME: two yes-or-no questions on each of 1,187 images, 14 subtasks; no training split of its own.

Read from the release's folders (both layouts: pictures beside the questions, or in `images/` and
`questions_answers_YN/`) or from the Parquet shards of its Hub copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.data.official import field, find
from pipeline.data.parquet import cell_name, rows
from pipeline.data.sample import ImageRef, Sample
from pipeline.scores.mme import GROUPS, MmeRow, MmeScore, is_right, subtask_score
from pipeline.tasks import PromptTemplate, SampleId, Score, Split, tasks
from pipeline.tasks.choice_files import CHOICE_TEMPLATE, ChoiceTask, accuracy, shards_in

PERCEPTION, COGNITION = GROUPS["Perception"], GROUPS["Cognition"]
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

# without a prefix: the stored question says what to answer with
MME_TEMPLATE = replace(
    CHOICE_TEMPLATE, instruction='Provide an answer in "Yes" or "No" to the question. Use the image to answer.'
)


@dataclass(frozen=True)
class Mme(ChoiceTask):
    """Yes-or-no questions; every split comes from the one test set, an image's two questions together."""

    name: str = "mme"
    stands_for: str = "mme"
    template: PromptTemplate = MME_TEMPLATE

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the shards, or else every text file of questions."""
        del split
        return shards_in(root, SHARD_FOLDERS) or tuple(text for _, _, text in self._texts(root))

    def samples(self, root: Path) -> Iterator[Sample]:
        """Yield every sample. An id is `<subtask>/<image>#<0 or 1>`."""
        return self._from_shards(root) if shards_in(root, SHARD_FOLDERS) else self._from_folders(root)

    def group(self, sample: Sample) -> str:
        """Keep an image's two questions together: accuracy+ needs both."""
        return f"{sample.meta['category']}/{sample.meta['image']}"

    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Score by accuracy; `metrics` has accuracy+ (both questions of an image right), perception and cognition.

        A subtask's score is 100 accuracy + 100 accuracy+ (at most 200); perception and cognition are sums of those.
        An image of which only one question was asked is left out of accuracy+.
        """
        answers = self.predictions_for(samples, predictions)
        right: dict[SampleId, bool] = {}
        asked: dict[str, dict[str, list[MmeRow]]] = {}
        for sample, answer in zip(samples, answers, strict=True):
            row = MmeRow(self.group(sample), sample.references[0], answer, str(sample.sample_id))
            right[sample.sample_id] = is_right(row)
            asked.setdefault(str(sample.meta["category"]), {}).setdefault(row.image, []).append(row)
        official = MmeScore({name: subtask_score(list(images.values())) for name, images in sorted(asked.items())})
        score = accuracy(self, samples, right, "category")
        score.details.update(
            accuracy_plus_per_category={name: task.accuracy_plus for name, task in official.tasks.items()},
            score_per_category={name: task.score for name, task in official.tasks.items()},
        )
        everything = subtask_score([rows for images in asked.values() for rows in images.values()])
        score.metrics.update(
            accuracy_plus=everything.accuracy_plus,
            perception=official.group("Perception").total,
            cognition=official.group("Cognition").total,
        )
        return score

    def _from_shards(self, root: Path) -> Iterator[Sample]:
        asked: dict[str, int] = {}
        for shard in shards_in(root, SHARD_FOLDERS):
            for row, record in rows(shard, ["question_id", "question", "answer", "category"]):
                place = f"{shard}: row {row}"
                key = field(record, "question_id", str, place)
                number = asked[key] = asked.get(key, -1) + 1
                path = cell_name(shard.relative_to(root).as_posix(), row, "image")
                category, image = field(record, "category", str, place), key.split("/", 1)[-1]
                question, answer = field(record, "question", str, place), field(record, "answer", str, place)
                yield self._sample(category, image, number, path, question, answer, place)

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
                # only "\n" ends a line here: splitlines would also cut inside a question, at U+2028 and the like
                lines = [line for line in text.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
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
tasks.register(MME)
