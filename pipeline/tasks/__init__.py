"""What a task is: official files in, samples out; a prompt; a score. One file a task, or for those of one kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.core.errors import InputError, nearest
from pipeline.core.plain_yaml import Json
from pipeline.core.registry import Registry
from pipeline.data.manifest import Manifest
from pipeline.data.official import find
from pipeline.data.sample import Sample
from pipeline.scores.files import printable

Split = Literal["train", "selection", "evaluation"]  # official data sets have no selection split of their own
SampleId = int | str
_SHOWN_IDS = 10  # in a message


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The text around one sample.

    A demonstration is `query + answer`, the query itself is `query` with the answer left open; they follow
    one another with nothing in between.

    Attributes:
        prefix: once, at the very beginning.
        prefix_needs_demos: the prefix is left out when there are no demonstrations.
        query: with `{image}` and, for questions, `{question}`.
        answer: with `{answer}`; closes a demonstration, and is the span that is trained.
        stop_words: generation is cut where one of them begins.
        instruction: the prefix as the published code words it, without the name of its role.
        cue: the role that the model speaks in.
    """

    prefix: str
    prefix_needs_demos: bool
    query: str
    answer: str
    stop_words: tuple[str, ...]
    instruction: str = ""
    cue: str = "Answer"

    @property
    def asks(self) -> bool:
        """Whether a sample comes with a question."""
        return "{question}" in self.query


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        value: in the task's unit.
        metric: such as `accuracy` or `CIDEr`.
        per_sample: the same metric by sample id, in the same unit.
        details: further figures (accuracy by answer type, ...).
        metrics: figures that stand beside `value` in the record of an evaluation and in its run.
        wrong_words: words of a prediction that the scorer knows to be wrong, by sample id.
    """

    value: float
    metric: str
    per_sample: dict[SampleId, float]
    details: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    wrong_words: dict[SampleId, list[str]] = field(default_factory=dict)


class IndexEntry(NamedTuple):
    """What the draw needs of a sample.

    Attributes:
        sample_id: the official id.
        images: its image files relative to the data root.
        group: samples of one group stay beside each other in the draw's order (the two questions that MME
            asks about an image); None where every sample stands for itself.
    """

    sample_id: SampleId
    images: tuple[str, ...]
    group: str | None = None


class Task(ABC):
    """One task over one data set.

    Attributes:
        name: as in params.yaml.
        stands_for: the papers' task whose column this fills (`mini-vqa` stands for `vqav2`).
        metric: name of the score.
        unit: `percent` or `fraction`.
        template: the prompt.
        max_new_tokens: default length of a generated answer, in tokens.
        one_pool: the data set has no train split of its own, so that all splits are drawn from the same
            files by `sweep.draw`, no image in two of them.
        official_evaluation: samples of the whole official evaluation split; None: its files tell.
    """

    name: str
    stands_for: str
    metric: str
    unit: Literal["percent", "fraction"]
    template: PromptTemplate
    max_new_tokens: int
    one_pool: bool = False
    official_evaluation: int | None = None

    @property
    def of_name(self) -> Mapping[str, Task]:
        """The tasks that it is made of, by name: itself alone, but for a mixture."""
        return {self.name: self}

    def template_for(self, sample: Sample) -> PromptTemplate:
        """Return the prompt around a sample."""
        del sample
        return self.template

    @property
    def definition(self) -> Json | None:
        """What a manifest keeps of a task that only settings describe; None: code does."""
        return None

    def notes(self, root: Path) -> tuple[str, ...]:
        """Return what was guessed of the files, and what was left out of them."""
        del root
        return ()

    @property
    def leaves_out(self) -> bool:
        """Whether a sample whose picture cannot be read is left out, counted and named; else none may be so."""
        return False

    def places(self, root: Path, images: Collection[str]) -> dict[str, str]:
        """Return what names each of the images, where a file of the user's own does."""
        del root, images
        return {}

    def pools(self, root: Path) -> tuple[Split, ...]:
        """Return the pools that the three splits are drawn from; the first chooses first."""
        del root
        return ("evaluation",) if self.one_pool else ("evaluation", "train")

    def with_splits(self, name: str) -> Task:
        """Return the task with its samples divided as `name` says; here only `official` is known.

        Raises:
            InputError: the data set is not divided so.
        """
        if name != "official":
            raise self._unknown_splits(name, ())
        return self

    def _unknown_splits(self, name: str, known: Sequence[str]) -> InputError:
        way_out = nearest(name, ["official", *known])
        return InputError(f"unknown splits '{name}' of {self.name}", where="subsample.splits", way_out=way_out)

    @abstractmethod
    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the official files that make up `split`, for their digests.

        Raises:
            InputError: one is missing; every place looked at is listed.
        """

    @abstractmethod
    def index(self, root: Path, split: Split) -> Iterator[IndexEntry]:
        """Yield id and images of every sample of `split`, without reading answers: cheap on a full file."""

    @abstractmethod
    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples of `split` (of the ids `only`; nothing is kept of others), in the official file's order.

        Raises:
            InputError: a file is missing, damaged or of another split; a question has no annotation.
        """

    @abstractmethod
    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Score `predictions`, cut where generation ends, against the samples' references.

        Raises:
            InputError: there is no sample, or a sample has no prediction.
        """

    def complete(
        self, score: Score, samples: Sequence[Sample], predictions: Mapping[SampleId, str], root: Path, split: Split
    ) -> Score:
        """Return `score` with the figures that need more files than the samples came from; here none.

        For the final evaluation alone: the scores that choose an epoch do without. What cannot be had is named in
        `details["left_out"]`.
        """
        del samples, predictions, root, split
        return score

    def predictions_for(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> list[str]:
        """Return the predictions in the order of `samples`; a missing one is an error with its id."""
        if not samples:
            raise InputError(
                "there are no samples to score", where=self.name, way_out="The evaluation split is empty; draw more"
            )
        missing = [sample.sample_id for sample in samples if sample.sample_id not in predictions]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(samples)} samples have no prediction: {shown_ids(missing)}",
                where=self.name,
                way_out="Score the samples that were generated for, or generate again",
            )
        return [predictions[sample.sample_id] for sample in samples]


IMAGE_FOLDERS = ("images", "coco", "coco/images", ".")


def image_folder(root: Path, subset: str) -> str:
    """Return the folder of the images of `subset` (such as `train2014`), relative to the data root.

    Looked for in this order: `images/<subset>`, `coco/<subset>`, `coco/images/<subset>`, `<subset>`.

    Raises:
        InputError: none of them exists; all are listed.
    """
    return find(root, IMAGE_FOLDERS, subset).relative_to(root).as_posix()


def shown_ids(ids: Sequence[object]) -> str:
    """Return the first ids, and how many more there are."""
    more = f", and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
    return ", ".join(map(printable, ids[:_SHOWN_IDS])) + more


def of_manifest(manifest: Manifest) -> Task:
    """Return the task that a manifest was drawn of, as it was then, where it is described there."""
    if manifest.definition is None:
        return tasks.get(manifest.task)
    return tasks.made(manifest.task, manifest.definition)


tasks: Registry[Task] = Registry("task", __name__, "hificl.tasks")
get = tasks.get
names = tasks.names
