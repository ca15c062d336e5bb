"""Several tasks as one: what an adapter that is to answer all of them is trained on (`vqav2+okvqa+coco`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import Json
from pipeline.data.manifest import SPLITS, Manifest
from pipeline.data.sample import Sample
from pipeline.tasks import IndexEntry, PromptTemplate, SampleId, Score, Split, Task, tasks


@dataclass(frozen=True)
class Mixture(Task):
    """Tasks whose samples stand in turn, each with the prompt of its own.

    Its score, which chooses an epoch, is the mean of its tasks' scores, percent as fractions; a number of one task is
    had by scoring the adapter on that task.

    Attributes:
        parts: the tasks.
        template: the first one's, which `predict` has without `--task`; an answer ends where one of any of them does.
    """

    name: str
    parts: tuple[Task, ...]
    template: PromptTemplate
    max_new_tokens: int
    stands_for: str = ""
    metric: str = "mean_of_tasks"
    unit: Literal["percent", "fraction"] = "fraction"

    @classmethod
    def of(cls, parts: Sequence[Task]) -> Mixture:
        """Return the mixture of some tasks.

        Raises:
            InputError: a task is named twice.
        """
        name = "+".join(part.name for part in parts)
        if len({part.name for part in parts}) < len(parts):
            raise InputError("names a task twice", where=f"the mixture {name}", way_out="Name each task once")
        stops = tuple(dict.fromkeys(chain.from_iterable(part.template.stop_words for part in parts)))
        template = replace(parts[0].template, stop_words=stops)
        return cls(name, tuple(parts), template, max(part.max_new_tokens for part in parts), stands_for=name)

    @property
    def definition(self) -> Json | None:
        """The definitions of its tasks, by name; None where code has all of them."""
        known: Json = {part.name: part.definition for part in self.parts}
        return known if any(known.values()) else None

    def template_for(self, sample: Sample) -> PromptTemplate:
        """Return the prompt of the sample's own task."""
        return self.of_name[sample.task].template

    @cached_property
    def of_name(self) -> dict[str, Task]:
        """Its tasks by name; never itself."""
        return {part.name: part for part in self.parts}

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the files of all of them."""
        return tuple(dict.fromkeys(chain.from_iterable(part.files(root, split) for part in self.parts)))

    def index(self, root: Path, split: Split) -> Iterator[IndexEntry]:
        """Yield what `Task.index` does of each of them, by the ids of the mixture."""
        for part in self.parts:
            for entry in part.index(root, split):
                yield entry._replace(sample_id=_id(part.name, entry.sample_id))

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples of each of them, by the ids of the mixture."""
        for part in self.parts:
            for sample in part.read(root, split):
                named = replace(sample, sample_id=_id(part.name, sample.sample_id))
                if only is None or named.sample_id in only:
                    yield named

    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Return the mean of the tasks' scores over those that have samples, and each beside it."""
        self.predictions_for(samples, predictions)
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.task, []).append(sample)
        scores = {name: self.of_name[name].score(group, predictions) for name, group in groups.items()}
        values = [score.value / (100 if self.of_name[name].unit == "percent" else 1) for name, score in scores.items()]
        per_sample = {key: value for score in scores.values() for key, value in score.per_sample.items()}
        beside = {f"{name}_{score.metric}": score.value for name, score in scores.items()}
        return Score(sum(values) / len(values), self.metric, per_sample, metrics=beside)

    def mix(self, manifests: Sequence[Manifest], sizes: Mapping[str, int | None]) -> Manifest:
        """Return the manifest of the mixture: of each split of its tasks' manifests the first samples, in turn.

        A picture that any of them is evaluated on is trained on by none.

        Args:
            manifests: of its tasks, in their order, from one data root.
            sizes: samples of each split; None: all.

        Raises:
            InputError: there are fewer.
        """
        first = manifests[0]
        held = {image.sha256 for manifest in manifests for s in manifest.splits["evaluation"] for image in s.images}
        splits: dict[str, tuple[Sample, ...]] = {}
        for split in SPLITS:
            columns = [
                [sample for sample in manifest.splits[split] if split == "evaluation" or not _shows(sample, held)]
                for manifest in manifests
            ]
            in_turn = [sample for row in zip_longest(*columns) for sample in row if sample is not None]
            size = sizes[split]
            if size is not None and len(in_turn) < size:
                raise InputError(
                    f"{size} samples were asked for in {split}, its tasks have {len(in_turn)}", where=self.name,
                    way_out=f"Raise subsample.num_{split}, or lower subsample.tasks.{self.name}.num_{split}",
                )  # fmt: skip
            splits[split] = tuple(replace(s, sample_id=_id(s.task, s.sample_id)) for s in in_turn[:size])
        sources = {source.path: source for manifest in manifests for source in manifest.sources}
        return replace(
            first, task=self.name, sources=tuple(sources[path] for path in sorted(sources)), splits=splits,
            replaced=(), definition=self.definition, notes=(),
        )  # fmt: skip


def _id(task: str, sample_id: SampleId) -> str:
    return f"{task}/{sample_id}"


def _shows(sample: Sample, held: Collection[str]) -> bool:
    return any(image.sha256 in held for image in sample.images)


tasks.mixed = Mixture.of
