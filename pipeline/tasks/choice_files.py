"""Questions with a closed set of answers: what MME, SEED-Bench and MMMU-Pro share."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

from pipeline.data.sample import Sample
from pipeline.tasks import IndexEntry, PromptTemplate, SampleId, Score, Split, Task

CHOICE_TEMPLATE = PromptTemplate(
    prefix="",
    prefix_needs_demos=False,
    query="Image: {image} Question: {question} Answer:",
    answer=" {answer}\n",
    stop_words=("Question", "Answer", "Image"),
)
_LETTER = re.compile(r"[\s(\[\"']*([A-Z])(?![A-Za-z])", re.IGNORECASE)


@dataclass(frozen=True)
class ChoiceTask(Task):
    """A published test set that every split is drawn from, scored by accuracy."""

    name: str
    stands_for: str
    template: PromptTemplate = CHOICE_TEMPLATE
    max_new_tokens: int = 10
    metric: str = "accuracy"
    unit: Literal["percent", "fraction"] = "percent"
    one_pool: bool = True

    @abstractmethod
    def samples(self, root: Path) -> Iterator[Sample]:
        """Yield every sample, in the order of the official files; see `Task.read`."""

    def group(self, sample: Sample) -> str | None:
        """Return what the sample shares with those that must stay beside it; see `IndexEntry`."""
        del sample
        return None

    def index(self, root: Path, split: Split) -> Iterator[IndexEntry]:
        """Yield id and images of every sample; see `Task.index`."""
        del split
        for sample in self.samples(root):
            images = tuple(dict.fromkeys(image.path for image in sample.images))
            yield IndexEntry(sample.sample_id, images, self.group(sample))

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        del split
        wanted = None if only is None else set(only)
        for sample in self.samples(root):
            if wanted is None or sample.sample_id in wanted:
                yield sample


def shards_in(root: Path, folders: Sequence[str]) -> tuple[Path, ...]:
    """Return the Parquet shards of the split `test` in the first of the folders that has any; none where none has."""
    shards_by_folder = (tuple(sorted((root / folder).glob("test-*.parquet"))) for folder in folders)
    return next((shards for shards in shards_by_folder if shards), ())


def with_choices(question: str, choices: Sequence[str], closing: str) -> str:
    """Return the question with its lettered choices and the publisher's closing words, each on a line of its own."""
    lettered = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([question, *lettered, closing])


def letter_of(answer: str) -> str:
    """Return the capital letter that the answer begins with ("b", "(B)", "B. a dog"), or "" if it has none."""
    letter = _LETTER.match(answer)
    return letter[1].upper() if letter else ""


def accuracy(task: Task, samples: Sequence[Sample], right: Mapping[SampleId, bool], by: str) -> Score:
    """Return the share of right answers in percent, over all and (in `details`) over the samples of each `meta[by]`."""
    per_sample = {key: 100.0 * is_right for key, is_right in right.items()}
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(str(sample.meta[by]), []).append(per_sample[sample.sample_id])
    details = {f"per_{by}": {name: sum(got) / len(got) for name, got in sorted(groups.items())}}
    return Score(sum(per_sample.values()) / len(per_sample), task.metric, per_sample, details)
