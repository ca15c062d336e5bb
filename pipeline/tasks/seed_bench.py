"""SEED-Bench v1, image questions (dimensions 1 to 9): four choices; no training split of its own.

The videos of dimensions 10 to 12 are not distributed with the benchmark; their questions are left out, as
in the papers, and not counted as missing images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.data.files import RecordFile, field, find
from pipeline.data.sample import ImageRef, Sample
from pipeline.errors import InputError
from pipeline.tasks import tasks
from pipeline.tasks.base import Entry, Normalise, PromptTemplate, SampleId, Score, Split, Task
from pipeline.tasks.caption_files import plain_file_name
from pipeline.tasks.choice_files import CHOICE_TEMPLATE, letter_score, with_choices

FOLDERS = ("seed_bench", "seed-bench", "SEED-Bench", ".")
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


@dataclass(frozen=True)
class SeedBench(Task):
    """Four-choice questions on one image; the target is the letter."""

    name: str = "seed-bench"
    stands_for: str = "seed-bench"
    template: PromptTemplate = CHOICE_TEMPLATE
    max_new_tokens: int = 10
    metric: str = "accuracy"
    unit: Literal["percent", "fraction"] = "percent"
    one_pool: bool = True

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the one file of questions."""
        del split
        return (find(root, FOLDERS, "SEED-Bench.json"),)

    def index(self, root: Path, split: Split) -> Iterator[Entry]:
        """Yield id and image of every sample; see `Task.index`."""
        for sample in self.read(root, split):
            yield Entry(sample.sample_id, (sample.images[0].path,))

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        wanted = None if only is None else set(only)
        (path,) = self.files(root, split)
        folder = find(root, FOLDERS, "SEED-Bench-image").relative_to(root).as_posix()
        seen: set[str] = set()
        file = RecordFile(path, ["questions"])
        found: list[tuple[Sample, int]] = []
        for _, _, record in file:
            if field(record, "data_type", str, file.where) != "image":
                continue
            sample_id = str(field(record, "question_id", (str, int), file.where))
            if sample_id in seen:
                raise InputError(f"question_id {sample_id} stands twice in the file", where=file.where())
            seen.add(sample_id)
            if wanted is None or sample_id in wanted:
                found.append(self._sample(record, file.where(), sample_id, folder))
        # Dimensions 3 and 4 changed names between releases: the file's own table, after the questions, is right.
        table = field(file.header, "question_type", dict, str(path))
        names = {number: name for name, number in table.items()}
        for sample, number in found:
            yield replace(sample, meta={**sample.meta, "dimension": names.get(number, str(number))})

    def score(
        self, samples: Sequence[Sample], predictions: Mapping[SampleId, str], *, normalise: Normalise = "always"
    ) -> Score:
        """Score by accuracy of the letters, over all and by dimension; see `letter_score`."""
        return letter_score(self, samples, predictions, "dimension")

    def _sample(self, record: Mapping[str, Any], where: str, sample_id: str, folder: str) -> tuple[Sample, int]:
        choices = [str(field(record, name, (str, int, float), where)) for name in CHOICES]
        answer = field(record, "answer", str, where).strip().upper()
        if answer not in {"A", "B", "C", "D"}:
            raise InputError(f"the answer is '{answer}', a letter from A to D is needed", where=where)
        # The pictures have no extension; the file's own first bytes tell its format.
        image = plain_file_name(field(record, "data_id", str, where), where)
        question = field(record, "question", str, where)
        sample = Sample(
            task=self.name,
            sample_id=sample_id,
            images=(ImageRef(f"{folder}/{image}"),),
            question=with_choices(question, choices),
            target=answer,
            references=(answer,),
            meta={"question": question, "choices": choices},
        )
        return sample, field(record, "question_type_id", int, where)


SEED_BENCH = SeedBench()
tasks.add(SEED_BENCH.name, SEED_BENCH)
