"""The seam of the methods without training: what they may look at, and what they give to a run.

A method shows demonstrations before a query, or edits the frozen model for the length of a `with` block, or both. What
it has to find out first (an index, a vector, the layer where it works best) it finds in `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from pipeline.adapters.options import Options
from pipeline.backbones.load import Loaded
from pipeline.core.registry import Registry
from pipeline.data.manifest import Manifest
from pipeline.data.sample import ImageRef, Sample
from pipeline.prompts.collate import Batch
from pipeline.prompts.prompt import Encoded


class Host(Protocol):
    """The resident backbone, as far as a method without training uses it."""

    loaded: Loaded

    def prompts(
        self, manifest: Manifest, queries: Sequence[Sample], demos: Sequence[Sequence[Sample]], *, answer: bool
    ) -> list[Encoded]:
        """Return prompts with demonstrations."""

    def batch(self, encoded: Sequence[Encoded], manifest: Manifest) -> Batch:
        """Return a right-padded batch on the device, with the images' visual tokens."""


@dataclass(frozen=True)
class Setting:
    """What a method without training may look at; the evaluation split is no part of it.

    Attributes:
        host: the resident backbone.
        manifest: of the task.
        pool: training samples: where demonstrations come from.
        selection: samples to choose a layer on; empty where the method's options leave nothing to choose.
        seed: of every draw.
        features: pooled features [N, D] of images, from the backbone's own vision tower.
        score: the task's score of samples without demonstrations, by the model as it is at the moment of the call.
    """

    host: Host
    manifest: Manifest
    pool: Sequence[Sample]
    selection: Sequence[Sample]
    seed: int
    features: Callable[[Sequence[ImageRef]], Tensor]
    score: Callable[[Sequence[Sample]], float]


class BaselineOptions(Options):
    """Options of a method without training."""

    def selects(self) -> bool:
        """Whether `fit` chooses something on the selection split; its size is then part of the trial."""
        return False


class Baseline:
    """One method without training.

    Attributes:
        found: what `fit` found, as JSON values; kept beside the predictions.
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type[BaselineOptions]] = BaselineOptions
    shows_demonstrations: ClassVar[bool] = False  # whether `demonstrations` returns any
    in_chunks: ClassVar[bool] = False  # whether each of its `chunks` is read in a prompt of its own

    def __init__(self, options: Any) -> None:
        self.options = options
        self.found: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        """Look at pool, selection split and model; called once, before anything else."""
        self.setting = setting

    def demonstrations(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """Return each query's demonstrations, in prompt order; none of them has the query's id."""
        return [[] for _ in queries]

    def chunks(self, query: Sample) -> list[tuple[float, list[Sample]]]:
        """Return the demonstrations in weighted chunks: prompts that write one answer together (`in_chunks`)."""
        return [(1.0, self.demonstrations([query])[0])]

    def edited(self) -> AbstractContextManager[None]:
        """Return a context in which the resident model computes as the method wants it."""
        return nullcontext()


baselines: Registry[type[Baseline]] = Registry("method without training", __name__, "hificl.methods")
