"""Scores adapters in training on the split that chooses the epoch; those that wait together are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipeline import adapters
from pipeline.adapters.pack import Pack, PackRows
from pipeline.data.sample import Sample
from pipeline.evaluate.predict import predict_each
from pipeline.train import loss
from pipeline.train.resident import Resident
from pipeline.train.trial_run import TrialRun

BATCH = 32


def select(resident: Resident, runs: Sequence[TrialRun], on_batch: Callable[[], None]) -> list[dict[str, float]]:
    """Return `objective` (higher is better) of every trial, and what it is: `selection_score` or `selection_loss`.

    Every rank generates its part. `on_batch` is called after every batch.
    """
    found: list[dict[str, float]] = [{} for _ in runs]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, run in enumerate(runs):
        metric = run.config.selection_metric
        groups.setdefault((run.manifest.digest, len(run.selection), run.config.selection, metric), []).append(number)
    with adapters.attach(resident.loaded.model, [run.adapter.eval() for run in runs]) as pack:
        for (*_, metric), numbers in groups.items():
            one = runs[numbers[0]]
            mine = one.selection[one.rank :: one.world]
            if metric == "loss":
                for number in numbers:
                    values = _gathered(_losses(resident, runs[number], pack, number, mine), one.world)
                    mean = sum(values.values()) / len(values)
                    found[number] = {"selection_loss": mean, "objective": -mean}
                continue
            pixels = one.facts.trains_vision
            texts = predict_each(resident, one.manifest, mine, pack, numbers, from_pixels=pixels, on_batch=on_batch)
            for number, answers in zip(numbers, texts, strict=True):
                score = one.task.score(one.selection, _gathered(answers, one.world))
                found[number] = {"selection_score": score.value, "objective": score.value}
    return found


def _gathered(mine: dict[Any, Any], world: int) -> dict[Any, Any]:
    """Return all ranks' parts of a mapping by sample id."""
    if world == 1:
        return mine
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


@torch.no_grad()
def _losses(resident: Resident, run: TrialRun, pack: Pack, number: int, samples: Sequence[Sample]) -> dict[Any, float]:
    model = resident.loaded.model
    found: dict[Any, float] = {}
    encoded = resident.alone(run.manifest, samples, answer=True)
    for start in range(0, len(encoded), BATCH):
        rows_of = encoded[start : start + BATCH]
        batch = resident.batch(rows_of, run.manifest, span=run.config.loss_span, pixels=run.facts.trains_vision)
        pack.use(PackRows((number,) * len(batch), batch.image_counts))
        hidden = model.model(**batch.model_inputs(resident.loaded), use_cache=False).last_hidden_state
        rows, positions, targets = loss.shifted(batch.labels)
        values = loss.cross_entropy(loss.logits_at(model, hidden, rows, positions), targets, rows, len(batch))
        found.update(zip(batch.sample_ids, values.tolist(), strict=True))
    return found
