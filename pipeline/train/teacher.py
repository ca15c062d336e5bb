"""The teacher: the frozen backbone on demonstrations and query, whose states or answers the student imitates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.adapters.options import Facts
from pipeline.backbones.decoder import DecoderSpec, decoder_of
from pipeline.data.collate import Batch
from pipeline.data.manifest import Manifest
from pipeline.data.prompt import Encoded, draw_demos
from pipeline.data.sample import Sample
from pipeline.errors import WorkError
from pipeline.train.loss import logits_at, shifted
from pipeline.train.resident import Resident

Point = Literal["ffn", "attention"]


@dataclass(frozen=True)
class Target:
    """What one sample's student is compared with.

    Attributes:
        hidden: hidden states of the last m tokens (query and answer) by layer, [m, D] each; empty for logits.
        logits: of the answer tokens, [n, V]; None for hidden states.
    """

    hidden: tuple[Tensor, ...]
    logits: Tensor | None

    @property
    def bytes(self) -> int:
        """Memory held."""
        tensors = [*self.hidden, *([self.logits] if self.logits is not None else [])]
        return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def recorded(spec: DecoderSpec, point: Point) -> Iterator[list[Tensor]]:
    """Collect each layer's hidden state after its FFN, or its self-attention's output, in order of the layers."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    modules = spec.layers if point == "ffn" else spec.attentions
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Teacher:
    """Computes targets for samples of one trial.

    Args:
        resident: the backbone; no adapter may be attached when `targets` is called.
        manifest: of the task.
        pool: training samples that demonstrations are drawn from.
        num_shots: how many.
        seed: of the draw.
        facts: whether hidden states or logits are compared, and where.
    """

    def __init__(
        self, resident: Resident, manifest: Manifest, pool: Sequence[Sample], num_shots: int, seed: int, facts: Facts
    ) -> None:
        self.resident, self.manifest, self.num_shots, self.seed, self.facts = resident, manifest, num_shots, seed, facts
        self.pool = {sample.sample_id: sample for sample in pool}
        self.ids = list(self.pool)
        self.spec = decoder_of(resident.loaded.model)

    def demonstrations(self, sample: Sample, epoch: int) -> list[Sample]:
        """Return the demonstrations of one sample in one epoch: drawn anew each time, never the sample itself."""
        drawn = draw_demos(self.ids, sample.sample_id, self.num_shots, self.seed, draw=epoch)
        return [self.pool[i] for i in drawn]

    @torch.no_grad()
    def targets(self, samples: Sequence[Sample], encoded: Sequence[Encoded], epoch: int) -> list[Target]:
        """Return the targets of samples whose own prompts are `encoded`."""
        shots = [self.demonstrations(sample, epoch) for sample in samples]
        prompts = self.resident.prompts(self.manifest, samples, shots, answer=True)
        batch = self.resident.batch(prompts, self.manifest)
        model = self.resident.loaded.model
        with recorded(self.spec, self.facts.alignment) as states:
            hidden = model.model(**batch.model_inputs(self.resident.loaded), use_cache=False).last_hidden_state
        found = []
        for row, (mine, behind) in enumerate(zip(encoded, prompts, strict=True)):
            count = query_length(mine, behind, self.resident.loaded.image_token_id)
            end = len(behind)
            if self.facts.teacher == "hidden":
                found.append(Target(tuple(h[row, end - count : end].clone() for h in states), None))
            else:
                found.append(Target((), self._logits(batch, hidden, row)))
        return found

    def _logits(self, batch: Batch, hidden: Tensor, row: int) -> Tensor:
        rows, positions, _ = shifted(batch.labels)
        mine = rows == row
        return logits_at(self.resident.loaded.model, hidden, rows[mine], positions[mine])


def query_length(alone: Encoded, behind: Encoded, image_token_id: int) -> int:
    """Return how many tokens of query and answer the two prompts share, counted from their ends.

    The turn's very first tokens may differ: a text's first word has no space before it, and a chat model's instruction
    stands inside the first turn. From the query's image on they must not.

    Raises:
        WorkError: the tokenizer reads the query differently behind demonstrations.
    """
    limit = min(len(alone) - alone.query_start, len(behind) - behind.query_start)
    pairs = zip(reversed(alone.input_ids), reversed(behind.input_ids), strict=False)
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), limit)
    image = behind.input_ids.index(image_token_id, behind.query_start)
    if differs < len(behind) - image:
        raise WorkError(f"sample {alone.sample_id} is tokenised differently behind demonstrations")
    return min(differs, limit)
