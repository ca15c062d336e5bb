"""How far the students of one forward pass are from what their teachers gave, in hidden states or in logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.backbones.base import placed
from pipeline.backbones.decoder import DecoderSpec
from pipeline.backbones.states import recorded
from pipeline.config.trial import State
from pipeline.prompts.collate import Batch
from pipeline.train import loss
from pipeline.train.prefix_sharing import PrefixLayout
from pipeline.train.trial_run import MicroBatch


@dataclass(frozen=True)
class _Compared:
    """What of a batch is compared in one state, for all trials at once.

    Attributes:
        numbers: in the pack, of each sample's trial.
        targets: of the samples.
        places: of the samples' tokens, one sample after another, in the flattened batch.
    """

    numbers: list[int]
    targets: list[Tensor]
    places: Tensor


class Imitation:
    """What the samples of one forward pass are compared with: their teachers' targets."""

    def __init__(self, chunk: Sequence[MicroBatch], batch: Batch) -> None:
        self.chunk = chunk
        self.compared: dict[State, _Compared] = {}
        self.states: dict[State, list[Tensor]] = {}  # the students', layer by layer, at the compared places
        samples: dict[State, list[tuple[int, int, Tensor]]] = {}  # number in the pack, row of the batch, target
        first = 0
        for part in chunk:
            for row, target in enumerate(part.targets, start=first):
                if target.hidden is not None:
                    samples.setdefault(part.trial.facts.state, []).append((part.number, row, target.hidden))
            first += len(part.ids)
        for state, of_state in samples.items():
            rows, targets = [row for _, row, _ in of_state], [target for *_, target in of_state]
            ends, counts = batch.lengths[rows].tolist(), [target.shape[1] for target in targets]
            places = loss.tails(rows, ends, counts, batch.input_ids.shape[1], batch.input_ids.device)
            self.compared[state] = _Compared([number for number, *_ in of_state], targets, places)

    @contextmanager
    def recording(self, spec: DecoderSpec, layout: PrefixLayout | None, *, again: bool) -> Iterator[None]:
        """Record the students' states while the model runs.

        Args:
            spec: the decoder.
            layout: says where the states stand.
            again: layers are computed again in the backward pass, when nobody records: what is taken of a state is
                taken outside them.
        """
        takes = {
            state: loss.at(compared.places if layout is None else layout.where(compared.places))
            for state, compared in self.compared.items()
        }
        with ExitStack() as stack:
            for state, take in takes.items():
                kept = recorded(spec, state) if again else recorded(spec, state, take)
                self.states[state] = stack.enter_context(kept)
            yield
        if again:
            self.states = {state: list(map(takes[state], whole)) for state, whole in self.states.items()}

    def distances(self, logits: Tensor, rows: Tensor) -> dict[int, Tensor]:
        """Return each taught trial's distance to its teacher, summed over its samples, by its number in the pack.

        Args:
            logits: the students', of the answers' tokens, [N, V].
            rows: of the batch, [N], on the CPU.
        """
        distances: dict[int, Tensor] = {}
        start = 0
        for part in self.chunk:
            end = start + len(part.ids)
            if part.trial.facts.teacher == "logits":
                taught_rows = ((rows >= start) & (rows < end)).nonzero()[:, 0]
                taught = torch.cat([target.logits for target in part.targets if target.logits is not None])
                of_part, samples = (placed(x, logits.device) for x in (taught_rows, rows[taught_rows] - start))
                distances[part.number] = loss.divergence(logits[of_part], taught, samples, end - start).sum()
            start = end
        for state, compared in self.compared.items():
            of_samples = loss.alignment(self.states[state], compared.targets)
            for number in set(compared.numbers):
                of_trial = torch.tensor([i for i, taught in enumerate(compared.numbers) if taught == number])
                distances[number] = of_samples[placed(of_trial, of_samples.device)].sum()
        return distances
