"""MMMU-Pro, configuration `standard (10 options)`: 1,730 questions, one to seven images; no training split.

Read from the official Parquet shards. `<image N>` in question or options always means the column `image_N`;
the images go to the model in the order of the markers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from pipeline.data.files import field
from pipeline.data.parquet import cell_name, rows
from pipeline.data.sample import ImageRef, Sample
from pipeline.errors import InputError
from pipeline.tasks import tasks
from pipeline.tasks.base import Entry, Normalise, PromptTemplate, SampleId, Score, Split, Task
from pipeline.tasks.choice_files import CHOICE_TEMPLATE, letter_score, with_choices

CONFIGURATION = "standard (10 options)"
FOLDERS = ("mmmu_pro", "mmmu-pro", "MMMU_Pro", ".")
COLUMNS = ("id", "question", "options", "answer", "subject", "topic_difficulty")
_MARKER = re.compile(r"<image\s+(\d+)>")


def parse_options(text: str, where: str) -> list[str]:
    """Return the options of a Python list literal ("['90', '98']"), nested lists kept as their text.

    Raises:
        InputError: the text is no list literal; nothing in it is ever run.
    """
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise InputError(f"'options' is no list: {text[:60]}", where=where, way_out="Get the shard again") from error
    if not isinstance(options, list) or not 1 <= len(options) <= len(ascii_uppercase):
        raise InputError(f"'options' is no list of options: {text[:60]}", where=where, way_out="Get the shard again")
    return [str(option) for option in options]


@dataclass(frozen=True)
class MmmuPro(Task):
    """Up to ten (once twelve) options, several images; the target is the letter."""

    name: str = "mmmu-pro"
    stands_for: str = "mmmu-pro"
    template: PromptTemplate = CHOICE_TEMPLATE
    max_new_tokens: int = 10
    metric: str = "accuracy"
    unit: Literal["percent", "fraction"] = "percent"
    one_pool: bool = True

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the shards of the configuration."""
        del split
        places = [root / folder / CONFIGURATION for folder in FOLDERS]
        for place in places:
            shards = tuple(sorted(place.glob("test-*.parquet")))
            if shards:
                return shards
        looked = ", ".join(place.relative_to(root).as_posix() + "/test-*.parquet" for place in places)
        raise InputError(f"no shard was found under the data root '{root}'", way_out=f"Looked at: {looked}")

    def index(self, root: Path, split: Split) -> Iterator[Entry]:
        """Yield id and images of every sample; see `Task.index`."""
        for sample in self.read(root, split):
            yield Entry(sample.sample_id, tuple(dict.fromkeys(image.path for image in sample.images)))

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        wanted = None if only is None else set(only)
        seen: set[str] = set()
        for shard in self.files(root, split):
            name = shard.relative_to(root).as_posix()
            for row, record in rows(shard, COLUMNS):
                where = f"{shard}: row {row}"
                sample_id = field(record, "id", str, where)
                if sample_id in seen:
                    raise InputError(f"id '{sample_id}' stands twice", where=where, way_out="Are two releases mixed?")
                seen.add(sample_id)
                if wanted is None or sample_id in wanted:
                    yield self._sample(record, f"{where} ('{sample_id}')", name, row)

    def score(
        self, samples: Sequence[Sample], predictions: Mapping[SampleId, str], *, normalise: Normalise = "always"
    ) -> Score:
        """Score by accuracy of the letters, over all and by subject; see `letter_score`.

        An answer without a letter counts as wrong; the official tool draws a random letter for it
        (`hificl score mmmu-pro` does as the official tool).
        """
        return letter_score(self, samples, predictions, "subject")

    def _sample(self, record: Mapping[str, Any], where: str, shard: str, row: int) -> Sample:
        question = field(record, "question", str, where)
        options = parse_options(field(record, "options", str, where), where)
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
            question=with_choices(question, options),
            target=answer,
            references=(answer,),
            meta={
                "question": question,
                "choices": options,
                "subject": field(record, "subject", str, where),
                "difficulty": record["topic_difficulty"],
            },
        )


MMMU_PRO = MmmuPro()
tasks.add(MMMU_PRO.name, MMMU_PRO)
