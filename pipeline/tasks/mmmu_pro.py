"""MMMU-Pro, configuration `standard (10 options)`: 1,730 questions, one to seven images; no training split.

Read from the official Parquet shards. `<image N>` in question or options always means the column `image_N`;
the images go to the model in the order of the markers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from pipeline.core.errors import InputError
from pipeline.data.official import field
from pipeline.data.parquet import cell_name, rows
from pipeline.data.sample import ImageRef, Sample
from pipeline.scores.mmmu_pro import mmmu_pro_scores, read_options
from pipeline.tasks import SampleId, Score, Split, tasks
from pipeline.tasks.choice_files import ChoiceTask, accuracy, shards_in, with_choices

CONFIGURATION = "standard (10 options)"
FOLDERS = ("mmmu_pro", "mmmu-pro", "MMMU_Pro", ".")
COLUMNS = ("id", "question", "options", "answer", "subject", "topic_difficulty")
CLOSING = "Answer with the option letter from the given choices directly."  # prompts.yaml, standard, direct
_MARKER = re.compile(r"<image\s+(\d+)>")


@dataclass(frozen=True)
class MmmuPro(ChoiceTask):
    """Up to ten (once twelve) options, several images; the target is the letter."""

    name: str = "mmmu-pro"
    stands_for: str = "mmmu-pro"

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the shards of the configuration."""
        del split
        places = [f"{folder}/{CONFIGURATION}" for folder in FOLDERS]
        shards = shards_in(root, places)
        if not shards:
            looked = ", ".join(f"{place}/test-*.parquet" for place in places)
            raise InputError(f"no shard was found under the data root '{root}'", way_out=f"Looked at: {looked}")
        return shards

    def samples(self, root: Path) -> Iterator[Sample]:
        """Yield every question."""
        seen: set[str] = set()
        for shard in self.files(root, "evaluation"):
            name = shard.relative_to(root).as_posix()
            for row, record in rows(shard, COLUMNS):
                place = f"{shard}: row {row}"
                sample_id = field(record, "id", str, place)
                if sample_id in seen:
                    raise InputError(f"id {sample_id!r} stands twice", where=place, way_out="Are two releases mixed?")
                seen.add(sample_id)
                yield self._sample(record, f"{place} ({sample_id!r})", name, row)

    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Score by the official rules, over all and by subject: what `hificl score mmmu-pro` gives for these answers.

        An answer whose letter cannot be read draws a random one, from the seed 0 and in the order of the samples;
        `metrics` has the accuracy without those answers (where any could be read), `details` their number.
        """
        answers = self.predictions_for(samples, predictions)
        results = [
            {
                "id": sample.sample_id,
                "options": sample.meta["choices"],
                "answer": sample.references[0],
                "response": answer,
            }
            for sample, answer in zip(samples, answers, strict=True)
        ]
        official = mmmu_pro_scores(results, where=self.name)
        right: dict[SampleId, bool] = {row.id: row.if_right for row in official.rows}
        score = accuracy(self, samples, right, "subject")
        score.details["n_random_fallback"] = official.n_random_fallback
        if official.accuracy_deterministic is not None:
            score.metrics["accuracy_of_readable"] = 100 * official.accuracy_deterministic
        return score

    def _sample(self, record: Mapping[str, Any], where: str, shard: str, row: int) -> Sample:
        question = field(record, "question", str, where)
        options = read_options(field(record, "options", str, where), where)
        if len(options) > len(ascii_uppercase):
            raise InputError(f"has {len(options)} options, there are 26 letters", where=where)
        answer = field(record, "answer", str, where).strip()
        if answer not in ascii_uppercase[: max(len(options), 10)] or len(answer) != 1:
            raise InputError(f"the answer is '{answer}', a letter of an option is needed", where=where)
        markers = [int(number) for text in (question, *options) for number in _MARKER.findall(text)]
        if not markers or not all(1 <= number <= 7 for number in markers):
            raise InputError(f"has the image markers {markers}; one of <image 1> to <image 7> is needed", where=where)
        return Sample(
            task=self.name,
            sample_id=record["id"],
            images=tuple(ImageRef(cell_name(shard, row, f"image_{number}")) for number in markers),
            question=with_choices(question, options, CLOSING),
            target=answer,
            references=(answer,),
            meta={
                "question": question,
                "choices": options,
                "subject": field(record, "subject", str, where),
                "difficulty": field(record, "topic_difficulty", str, where),
            },
        )


MMMU_PRO = MmmuPro()
tasks.register(MMMU_PRO)
