"""Scores adapters in training on the split that chooses the epoch; those that wait together are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline import adapters
from pipeline.adapters.pack import Pack, PackRows
from pipeline.backbones.base import placed
from pipeline.backbones.decoder import told
from pipeline.backbones.passes import bytes_of_row, of_all_ranks
from pipeline.data.manifest import Manifest
from pipeline.data.sample import Sample
from pipeline.evaluate.generate import Decoding, predict_each
from pipeline.prompts.collate import TrainedSpan
from pipeline.prompts.prompt import Encoded
from pipeline.resident.resident import Resident
from pipeline.train import loss
from pipeline.train.trial_run import TrialRun

BATCH = 32


def select(resident: Resident, trials: Sequence[TrialRun], on_batch: Callable[[], None]) -> list[dict[str, float]]:
    """Return `objective` (higher is better) of every trial, and what it is: `selection_score` or `selection_loss`.

    Every rank generates its part. `on_batch` is called after every batch.
    """
    scores: list[dict[str, float]] = [{} for _ in trials]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, trial in enumerate(trials):
        config = trial.config
        key = (trial.manifest.digest, len(trial.selection), config.selection, config.selection_metric)
        groups.setdefault(key, []).append(number)
    with adapters.attach(resident.loaded.model, [trial.adapter.eval() for trial in trials]) as pack:
        for (*_, metric), numbers in groups.items():
            first = trials[numbers[0]]
            samples = _of_rank(first, together=resident.loaded.passes.together)
            if metric == "loss":
                for number in numbers:
                    trial = trials[number]
                    losses = _merged(
                        answer_losses(
                            resident, trial.manifest, samples, pack, number, span=trial.config.loss_span,
                            pixels=trial.facts.trains_vision,
                        )
                    )  # fmt: skip
                    mean = sum(losses.values()) / len(losses)
                    scores[number] = {"selection_loss": mean, "objective": -mean}
                continue
            decoding = Decoding(from_pixels=first.facts.trains_vision)
            texts = predict_each(resident, first.manifest, samples, pack, numbers, decoding, on_batch=on_batch)
            for number, answers in zip(numbers, texts, strict=True):
                score = first.task.score(first.selection, _merged(answers))
                scores[number] = {"selection_score": score.value, "objective": score.value}
    return scores


def _of_rank(trial: TrialRun, *, together: bool) -> Sequence[Sample]:
    """Return the rank's share of the selection split; as many on every rank where they make their passes together."""
    samples = trial.selection[trial.rank :: trial.world]
    missing = -(-len(trial.selection) // trial.world) - len(samples) if together else 0
    return [*samples, *trial.selection[:missing]]


def _merged(of_rank: dict[Any, Any]) -> dict[Any, Any]:
    """Return all ranks' parts of a mapping by sample id; of what several have, the first one's."""
    return {key: value for part in reversed(of_all_ranks(of_rank)) for key, value in part.items()}


@torch.no_grad()
def answer_losses(
    resident: Resident, manifest: Manifest, samples: Sequence[Sample], pack: Pack, number: int = 0, *,
    span: TrainedSpan = "answer", pixels: bool = False,
) -> dict[Any, float]:  # fmt: skip
    """Return the cross-entropy of every sample's answer, by id, with the adapter `number` of the pack.

    Args:
        resident: the backbone in memory.
        manifest: that the samples are of.
        samples: the questions with their answers.
        pack: attached to the backbone.
        number: of the adapter.
        span: which tokens count.
        pixels: the adapter is in the vision tower too.
    """
    model = resident.loaded.model
    losses: dict[Any, float] = {}
    prompts = resident.alone(manifest, samples, answer=True)

    def of_rows(chunk: Sequence[Encoded]) -> list[tuple[Any, float]]:
        batch = resident.batch(chunk, manifest, span=span, pixels=pixels)
        pack.use(PackRows((number,) * len(batch), batch.image_counts))
        with told(resident.device, padded=False):
            hidden = model.model(**batch.model_inputs(resident.loaded), use_cache=False).last_hidden_state
        rows, positions, targets = (placed(x, hidden.device) for x in loss.shifted(batch.labels))
        values = loss.cross_entropy(loss.logits_at(model, hidden, rows, positions), targets, rows, len(batch))
        return list(zip(batch.sample_ids, values.tolist(), strict=True))

    passes = resident.loaded.passes
    for start in range(0, len(prompts), BATCH):
        losses.update(
            passes.run(
                "selection", prompts[start : start + BATCH], of_rows, width=len, device=resident.loaded.device,
                bytes_of=lambda tokens: bytes_of_row(model, tokens, caches=0),
            )
        )  # fmt: skip
    return losses
