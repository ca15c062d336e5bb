"""How far the students of one forward pass are from what their teachers gave, in hidden states or in logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from pipeline.backbones.decoder import DecoderSpec
from pipeline.backbones.states import recorded
from pipeline.config.trial import State
from pipeline.prompts.collate import Batch
from pipeline.train import loss
from pipeline.train.prefix_sharing import PrefixLayout
from pipeline.train.trial_run import MicroBatch


class Imitation:
    """What the samples of one forward pass are compared with: their teachers' targets.

    Args:
        chunk: the samples, trial by trial.
        batch: of all of them.
        layout: where their tokens stand in the decoder's rows, if not in rows of their own.
    """

    def __init__(self, chunk: Sequence[MicroBatch], batch: Batch, layout: PrefixLayout | None) -> None:
        self.chunk = chunk
        self.states: dict[State, list[Tensor]] = {}  # the students', layer by layer, at the compared places
        self._spans: dict[int, slice] = {}  # of the places, by the number of a part in the chunk
        compared: dict[State, tuple[list[int], list[int]]] = {}  # the samples, and how many tokens of each
        first = 0
        for number, part in enumerate(chunk):
            counts = [target.hidden.shape[1] for target in part.targets if target.hidden is not None]
            if counts:
                samples, before = compared.setdefault(part.trial.facts.state, ([], []))
                self._spans[number] = slice(sum(before), sum(before) + sum(counts))
                samples += range(first, first + len(counts))
                before += counts
            first += len(part.ids)
        self._takes = {}
        for state, (samples, counts) in compared.items():
            ends = batch.lengths[samples].tolist()
            places = loss.tails(samples, ends, counts, batch.input_ids.shape[1], batch.input_ids.device)
            self._takes[state] = loss.at(places if layout is None else layout.where(places))

    @contextmanager
    def recording(self, spec: DecoderSpec, *, again: bool) -> Iterator[None]:
        """Record the students' states while the model runs.

        Args:
            spec: the decoder.
            again: layers are computed again in the backward pass, when nobody records: what is taken of a state is
                taken outside them.
        """
        with ExitStack() as stack:
            for state, take in self._takes.items():
                kept = recorded(spec, state) if again else recorded(spec, state, take)
                self.states[state] = stack.enter_context(kept)
            yield
        if again:
            self.states = {state: list(map(self._takes[state], whole)) for state, whole in self.states.items()}

    def distance(self, number: int, logits: Tensor, rows: Tensor) -> Tensor:
        """Return a taught part's distance to its teacher, summed over its samples.

        Args:
            number: of the part in the chunk.
            logits: the student's, of the answers' tokens, [N, V].
            rows: the sample of each of these, [N].
        """
        part = self.chunk[number]
        if part.trial.facts.teacher == "logits":
            taught = torch.cat([target.logits for target in part.targets if target.logits is not None])
            return loss.divergence(logits, taught, rows, len(part.ids)).sum()
        states = [of_layer[self._spans[number]] for of_layer in self.states[part.trial.facts.state]]
        return loss.alignment(states, [t.hidden for t in part.targets if t.hidden is not None]).sum()
