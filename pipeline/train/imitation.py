"""How far the students of one forward pass are from what their teachers gave, in hidden states or in logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

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
        self.rows = [1 if layout else len(part.ids) for part in chunk]  # of the decoder, of each part
        self.places: list[Tensor | None] = []  # of the compared tokens, in the part's own rows one after another
        self.states: dict[State, list[list[Tensor]]] = {}  # the students', layer by layer, of each part
        width, first = batch.input_ids.shape[1], 0
        for number, part in enumerate(chunk):
            last, hidden = first + len(part.ids), [t.hidden for t in part.targets if t.hidden is not None]
            places = None
            if hidden:
                ends, counts = batch.lengths[first:last].tolist(), [target.shape[1] for target in hidden]
                places = loss.tails(range(first, last), ends, counts, width, batch.input_ids.device)
                places = places - first * width if layout is None else layout.where(places) - number * layout.length
            self.places.append(places)
            first = last

    @contextmanager
    def recording(self, spec: DecoderSpec, *, again: bool) -> Iterator[None]:
        """Record the students' states while the model runs.

        Args:
            spec: the decoder.
            again: layers are computed again in the backward pass, when nobody records: what is taken of a state is
                taken outside them.
        """
        of_parts = zip(self.chunk, self.places, strict=True)
        with ExitStack() as stack:
            seen: dict[State, list[Any]] = {
                state: stack.enter_context(recorded(spec, state) if again else recorded(spec, state, self._taken))
                for state in {part.trial.facts.state for part, places in of_parts if places is not None}
            }
            yield
        for state, layers in seen.items():
            self.states[state] = [self._taken(x) for x in layers] if again else layers

    def _taken(self, hidden: Tensor) -> list[Tensor]:
        """Return what is compared of a layer's states [B, T, D]: [N, D] of each part, N = 0 without a teacher."""
        flat = [part.flatten(0, 1) for part in hidden.split(self.rows)]
        return [
            states[:0] if places is None else states[places.to(states.device)]
            for states, places in zip(flat, self.places, strict=True)
        ]

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
        states = [of_layer[number] for of_layer in self.states[part.trial.facts.state]]
        return loss.alignment(states, [t.hidden for t in part.targets if t.hidden is not None]).sum()
