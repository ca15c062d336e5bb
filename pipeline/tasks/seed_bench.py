"""SEED-Bench v1, image questions (dimensions 1 to 9): four choices; no training split of its own.

Read from the release's `SEED-Bench.json` and folder of pictures, or from the Parquet shards of its Hub copy.
The videos of dimensions 10 to 12 are not distributed with the benchmark; their questions are left out, as
in MimIC's code, and not counted as missing images. MimIC's text describes SEED-Bench-2; docs/tasks.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import InputError
from pipeline.data.official import RecordFile, field, find
from pipeline.data.parquet import cell_name, rows
from pipeline.data.sample import ImageRef, Sample
from pipeline.scores.files import printable
from pipeline.scores.seed_bench import seed_bench_scores
from pipeline.tasks import SampleId, Score, Split, tasks
from pipeline.tasks.caption_files import plain_file_name
from pipeline.tasks.choice_files import ChoiceTask, accuracy, letter_of, shards_in, with_choices

FOLDERS = ("seed_bench", "seed-bench", "SEED-Bench", ".")
SHARD_FOLDERS = tuple(f"{folder}{data}" for folder in FOLDERS[:-1] for data in ("/data", ""))
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
# The benchmark itself ranks the choices by likelihood; these are the words with which models are asked for a letter.
CLOSING = "Answer with the option's letter from the given choices directly."
COLUMNS = (*CHOICES, "answer", "data_type", "question", "question_id", "question_type_id")


@dataclass(frozen=True)
class SeedBench(ChoiceTask):
    """Four-choice questions on one image; the target is the letter."""

    name: str = "seed-bench"
    stands_for: str = "seed-bench"

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the shards, or else the one file of questions."""
        del split
        return shards_in(root, SHARD_FOLDERS) or (find(root, FOLDERS, "SEED-Bench.json"),)

    def samples(self, root: Path) -> Iterator[Sample]:
        """Yield every question on an image; the videos' are left out."""
        shards = shards_in(root, SHARD_FOLDERS)
        samples = self._from_shards(root, shards) if shards else self._from_file(root)
        seen: set[str] = set()
        for sample, place in samples:
            if sample.sample_id in seen:
                raise InputError(f"question_id {printable(sample.sample_id)} stands twice in the data set", where=place)
            seen.add(str(sample.sample_id))
            yield sample

    def _from_shards(self, root: Path, shards: Sequence[Path]) -> Iterator[tuple[Sample, str]]:
        for shard in shards:
            name = shard.relative_to(root).as_posix()
            for row, record in rows(shard, COLUMNS):
                place = f"{shard}: row {row}"
                if field(record, "data_type", str, place) == "image":
                    sample, number = self._sample(record, place, cell_name(name, row, "image", 0))
                    yield replace(sample, meta={**sample.meta, "dimension": str(number)}), place

    def _from_file(self, root: Path) -> Iterator[tuple[Sample, str]]:
        (path,) = self.files(root, "evaluation")
        folder = find(root, FOLDERS, "SEED-Bench-image").relative_to(root).as_posix()
        file = RecordFile(path, ["questions"])
        questions: list[tuple[Sample, int, str]] = []
        for _, _, record in file:
            if field(record, "data_type", str, file.where) != "image":
                continue
            place = file.where()
            # The pictures have no extension; the file's own first bytes tell its format.
            image = plain_file_name(field(record, "data_id", str, place), place)
            questions.append((*self._sample(record, place, f"{folder}/{image}"), place))
        # Dimensions 3 and 4 changed names between releases: the file's own table, after the questions, is right.
        table = field(file.header, "question_type", dict, str(path))
        names = {field(table, name, int, f"{path}: 'question_type'"): name for name in table}
        for sample, number, place in questions:
            yield replace(sample, meta={**sample.meta, "dimension": names.get(number, str(number))}), place

    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Score by accuracy of the letters that the answers begin with, over all and by dimension."""
        answers = self.predictions_for(samples, predictions)
        results = [
            {"question_id": sample.sample_id, "prediction": letter_of(answer), "gt_answer": sample.references[0]}
            for sample, answer in zip(samples, answers, strict=True)
        ]
        scored = seed_bench_scores(results, where=self.name).rows
        right: dict[SampleId, bool] = {row.question_id: row.if_right for row in scored}
        return accuracy(self, samples, right, "dimension")

    def _sample(self, record: Mapping[str, Any], where: str, image: str) -> tuple[Sample, int]:
        choices = [str(field(record, name, (str, int, float), where)) for name in CHOICES]
        answer = field(record, "answer", str, where).strip().upper()
        if answer not in {"A", "B", "C", "D"}:
            raise InputError(f"the answer is '{answer}', a letter from A to D is needed", where=where)
        question = field(record, "question", str, where)
        sample = Sample(
            task=self.name,
            sample_id=str(field(record, "question_id", (str, int), where)),
            images=(ImageRef(image),),
            question=with_choices(question, choices, CLOSING),
            target=answer,
            references=(answer,),
            meta={"question": question, "choices": choices},
        )
        return sample, field(record, "question_type_id", int, where)


SEED_BENCH = SeedBench()
tasks.register(SEED_BENCH)
