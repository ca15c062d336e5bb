"""A trial's score on a split: with its adapter, or as the method without training that it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from pipeline import adapters, methods
from pipeline.baselines import Baseline, Setting, baselines
from pipeline.data.manifest import Manifest
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate.predict import predict
from pipeline.request import TrialRequest
from pipeline.tasks import tasks
from pipeline.tasks.base import Split
from pipeline.train import image_features
from pipeline.train.resident import Resident
from pipeline.trial import EvaluationConfig, TrialConfig


def score_trial(
    resident: Resident, request: TrialRequest, evaluation: EvaluationConfig, *, batch_size: int = 64
) -> dict[str, Any]:
    """Return the record of a scored trial: configuration, score, predictions; without schema and run id.

    Args:
        resident: the trial's backbone.
        request: the trial.
        evaluation: the split, and how text is generated for it.
        batch_size: prompts generated at once.

    Raises:
        InputError: the adapter or the data are not the trial's, or a method's options do not fit them.
    """
    started = time.perf_counter()
    config = request.config
    manifest = resident.manifest(Path(request.manifest), config.manifest_digest)
    samples: Sequence[Sample] = manifest.splits[evaluation.split][: evaluation.num_samples]
    model = resident.loaded.model
    shots: dict[Any, list[Sample]] = {}
    found: dict[str, Any] = {}
    context: AbstractContextManager[object]
    if methods.is_trained(config.method):
        context = adapters.attach(model, adapters.load(Path(request.folder) / "adapter", model))
    else:
        method = fitted(config, resident, manifest, batch_size=batch_size)
        samples = _whole_batches(samples, evaluation, method)
        shown = method.demonstrations(samples)
        shots = {sample.sample_id: demos for sample, demos in zip(samples, shown, strict=True)}
        context, found = method.edited(), method.found
    with context:
        texts = predict(
            resident, manifest, samples, demonstrations=lambda sample: shots.get(sample.sample_id, []),
            max_new_tokens=evaluation.max_new_tokens, num_beams=evaluation.num_beams,
            length_penalty=evaluation.length_penalty, batch_size=batch_size,
            from_pixels=methods.facts_of(config.method, config.options).trains_vision,
        )  # fmt: skip
    task = tasks.get(config.task)
    score = task.score(samples, texts, normalise=evaluation.vqa_normalise, stem=evaluation.stem_predictions)
    seconds = time.perf_counter() - started  # of what an answer costs; reading further annotations is no part of it
    official: Split = "evaluation" if evaluation.split == "evaluation" else "train"  # the selection is drawn from it
    score = task.complete(score, samples, texts, manifest.image_root, official)
    return {
        "trial": config.key, "config": config.model_dump(mode="json"), "evaluation": evaluation.model_dump(mode="json"),
        "metric": score.metric, "unit": task.unit, "value": score.value,
        "metrics": {score.metric: score.value, **score.metrics}, "details": score.details,
        "num_samples": len(samples), "seconds": seconds, "found": found,
        "predictions": [
            {
                "sample_id": s.sample_id, "prediction": texts[s.sample_id],
                "score": score.per_sample.get(s.sample_id), "question": s.question,
                "references": list(s.references), "image": str(manifest.image_root / s.images[0].path),
                "hallucinated": score.hallucinated.get(s.sample_id, []),
            }
            for s in samples
        ],
    }  # fmt: skip


def fitted(config: TrialConfig, resident: Resident, manifest: Manifest, *, batch_size: int = 64) -> Baseline:
    """Return a trial's method without training, ready to show demonstrations and to edit the resident model.

    Args:
        config: the trial.
        resident: its backbone.
        manifest: its samples; the evaluation split is read only where the trial selects on it (`selection: test`).
        batch_size: prompts generated at once where a layer is chosen.
    """
    kind = baselines.get(config.method)
    method = kind(kind.Options.checked(config.options, config.method))
    method.fit(
        Setting(
            host=resident,
            manifest=manifest,
            pool=manifest.splits["train"][: config.num_train_samples],
            selection=_selection(config, manifest),
            seed=config.seed,
            features=_features(resident, manifest),
            score=_scorer(resident, manifest, batch_size),
        )
    )
    return method


def _selection(config: TrialConfig, manifest: Manifest) -> Sequence[Sample]:
    # as for methods that train: the papers choose on the whole test split
    if config.selection == "test":
        return manifest.splits["evaluation"]
    return manifest.splits["selection"][: config.num_selection_samples]


def _features(resident: Resident, manifest: Manifest) -> Callable[[Sequence[ImageRef]], torch.Tensor]:
    store = image_features.beside(resident.visual)
    return lambda images: torch.stack(store.get(images, manifest.image_root))


def _scorer(resident: Resident, manifest: Manifest, batch_size: int) -> Callable[[Sequence[Sample]], float]:
    task = tasks.get(manifest.task)

    def score(samples: Sequence[Sample]) -> float:
        return task.score(samples, predict(resident, manifest, samples, batch_size=batch_size)).value

    return score


def _whole_batches(samples: Sequence[Sample], evaluation: EvaluationConfig, method: Baseline) -> Sequence[Sample]:
    """Leave out a last batch that is not full, where the evaluation asks for it and prompts have demonstrations.

    Of fewer samples than one batch none is left out.
    """
    size = evaluation.drop_incomplete_batch
    if size is None or not method.shows_demonstrations:
        return samples
    return samples[: len(samples) // size * size] or samples
