"""Multiple choice answered with a letter: what SEED-Bench and MMMU-Pro share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from pipeline.data.sample import Sample
from pipeline.tasks.base import PromptTemplate, SampleId, Score, Task

CHOICE_TEMPLATE = PromptTemplate(
    prefix="",
    prefix_needs_demos=False,
    query="Image: {image} Question: {question} Answer:",
    answer=" {answer}\n",
    stop_words=("Question", "Answer", "Image"),
)
_LETTER = re.compile(r"[\s(\[\"']*([A-Z])(?![A-Za-z])", re.IGNORECASE)


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return the question followed by its lettered choices, as MimIC words it."""
    lettered = " ".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    return f"{question} Choices: {lettered} Answer with the letter."


def letter_of(answer: str) -> str:
    """Return the capital letter that the answer begins with ("b", "(B)", "B. a dog"), or "" if it has none."""
    found = _LETTER.match(answer)
    return found[1].upper() if found else ""


def letter_score(task: Task, samples: Sequence[Sample], predictions: Mapping[SampleId, str], by: str) -> Score:
    """Score by accuracy in percent: the letter read from the answer is the right one; none counts as wrong.

    Args:
        task: named in messages.
        samples: their one reference is the right letter.
        predictions: answers by sample id.
        by: key of `Sample.meta`; the accuracy of each of its values is in `details`.
    """
    answers = task.predictions_for(samples, predictions)
    per_sample = {
        sample.sample_id: 100.0 * (letter_of(answer) == sample.references[0])
        for sample, answer in zip(samples, answers, strict=True)
    }
    return accuracy(task, samples, per_sample, by)


def accuracy(task: Task, samples: Sequence[Sample], per_sample: dict[SampleId, float], by: str) -> Score:
    """Return the mean of `per_sample`, over all and (in `details`) over the samples of each `meta[by]`."""
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(str(sample.meta[by]), []).append(per_sample[sample.sample_id])
    details = {f"per_{by}": {name: sum(got) / len(got) for name, got in sorted(groups.items())}}
    return Score(sum(per_sample.values()) / len(per_sample), task.metric, per_sample, details)
