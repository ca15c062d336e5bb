"""SEED-Bench v1, image questions (dimensions 1 to 9): four choices; no training split of its own.

The videos of dimensions 10 to 12 are not distributed with the benchmark; their questions are left out, as
in the papers, and not counted as missing images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.files import RecordFile, field, find
from pipeline.data.sample import ImageRef, Sample
from pipeline.errors import InputError
from pipeline.scores.seed_bench import seed_bench_scores
from pipeline.tasks import tasks
from pipeline.tasks.base import Normalise, SampleId, Score, Split
from pipeline.tasks.caption_files import plain_file_name
from pipeline.tasks.choice_files import ChoiceTask, accuracy, letter_of, with_choices

FOLDERS = ("seed_bench", "seed-bench", "SEED-Bench", ".")
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


@dataclass(frozen=True)
class SeedBench(ChoiceTask):
    """Four-choice questions on one image; the target is the letter."""

    name: str = "seed-bench"
    stands_for: str = "seed-bench"

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the one file of questions."""
        del split
        return (find(root, FOLDERS, "SEED-Bench.json"),)

    def samples(self, root: Path) -> Iterator[Sample]:
        """Yield every question on an image; the videos' are left out."""
        (path,) = self.files(root, "evaluation")
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
            found.append(self._sample(record, file.where(), sample_id, folder))
        # Dimensions 3 and 4 changed names between releases: the file's own table, after the questions, is right.
        table = field(file.header, "question_type", dict, str(path))
        names = {number: name for name, number in table.items()}
        for sample, number in found:
            yield replace(sample, meta={**sample.meta, "dimension": names.get(number, str(number))})

    def score(
        self, samples: Sequence[Sample], predictions: Mapping[SampleId, str], *, normalise: Normalise = "always"
    ) -> Score:
        """Score by accuracy of the letters that the answers begin with, over all and by dimension."""
        answers = self.predictions_for(samples, predictions)
        results = [
            {"question_id": sample.sample_id, "prediction": letter_of(answer), "gt_answer": sample.references[0]}
            for sample, answer in zip(samples, answers, strict=True)
        ]
        rows = seed_bench_scores(results, where=self.name).rows
        right: dict[SampleId, bool] = {row["question_id"]: row["if_right"] for row in rows}
        return accuracy(self, samples, right, "dimension")

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
