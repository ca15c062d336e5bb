"""A trial's score on a split, in two steps that can lie on different machines.

`answer` lets one trial, or several that share the passes, answer a part of the split; `score` puts all parts together
and asks the task, because a corpus score such as CIDEr needs every caption at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import adapters, methods
from pipeline.baselines import Baseline, Setting, baselines
from pipeline.config.load import TrialRequest
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.data.manifest import Manifest, training_samples
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate.generate import Decoding, SplitPart, predict, predict_each
from pipeline.records import as_written
from pipeline.records.evaluation import Evaluation, Prediction
from pipeline.resident.resident import Resident, image_features
from pipeline.tasks import Split, of_manifest
from pipeline.tasks.vqa import VqaTask


@dataclass(frozen=True)
class Answers:
    """What a trial answered in one part of a split.

    Attributes:
        texts: answer by sample id.
        seconds: the trial's share of what the part took.
        found: what a method without training found out first.
    """

    texts: dict[Any, str]
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)


def answer(
    resident: Resident, requests: Sequence[TrialRequest], evaluation: EvaluationConfig, part: SplitPart,
    batch_size: int, on_batch: Callable[[], None] = lambda: None,
) -> list[Answers]:  # fmt: skip
    """Return each trial's answers to one part of a split.

    Args:
        resident: the trials' backbone.
        requests: one trial, or several with one `pack_key` and one manifest, which are decoded in shared batches.
        evaluation: the split, and how text is generated for it; the trial that it names is not read.
        part: which batches.
        batch_size: prompts generated at once.
        on_batch: called after every batch.

    Raises:
        InputError: an adapter or the data are not the trial's, or a method's options do not fit them.
    """
    started = time.perf_counter()
    first = requests[0].config
    manifest = resident.manifest(requests[0])
    pixels = methods.facts(first).trains_vision
    decoding = Decoding(evaluation.max_new_tokens, evaluation.num_beams, evaluation.length_penalty, batch_size, pixels)
    model = resident.loaded.model
    learned: dict[str, Any] = {}
    samples = _samples(manifest, evaluation)
    if methods.is_trained(first.method):
        trained = [adapters.load(Path(request.folder) / "adapter", model) for request in requests]
        with adapters.attach(model, trained) as pack:
            if len(trained) == 1:
                texts = [predict(resident, manifest, samples, decoding, part=part, on_batch=on_batch)]
            else:
                members = range(len(trained))
                texts = predict_each(resident, manifest, samples, pack, members, decoding, part, on_batch)
    else:
        method = fitted(first, resident, manifest, batch_size=batch_size)
        samples = asked(first, evaluation, manifest)
        shown = method.demonstrations(samples)
        shots = {sample.sample_id: demos for sample, demos in zip(samples, shown, strict=True)}
        with method.edited():
            chunks = method.chunks if method.in_chunks else None
            texts = [
                predict(resident, manifest, samples, decoding, lambda s: shots[s.sample_id], part, chunks, on_batch)
            ]
        learned = method.found
    seconds = (time.perf_counter() - started) / len(requests)
    return [Answers(of_trial, seconds, learned) for of_trial in texts]


def score(
    resident: Resident, request: TrialRequest, evaluation: EvaluationConfig, parts: Sequence[Answers]
) -> Evaluation:
    """Return a trial's score from all parts of its answers; its run and the code that scored are added by the stage."""
    config, manifest = request.config, resident.manifest(request)
    started = time.perf_counter()
    samples = asked(config, evaluation, manifest)
    texts = {sample_id: text for part in parts for sample_id, text in part.texts.items()}
    task = of_manifest(manifest)
    if isinstance(task, VqaTask):
        task = replace(task, normalise=evaluation.vqa_normalise, stem_predictions=evaluation.stem_predictions)
    result = task.score(samples, texts)
    # of what an answer costs; reading further annotations is no part of it
    seconds = sum(part.seconds for part in parts) + time.perf_counter() - started
    official: Split = "evaluation" if evaluation.split == "evaluation" else "train"  # the selection is drawn from it
    result = task.complete(result, samples, texts, manifest.image_root, official)
    predictions = (
        Prediction(
            sample_id=sample.sample_id, prediction=texts[sample.sample_id],
            score=result.per_sample.get(sample.sample_id), question=sample.question, references=sample.references,
            image=str(manifest.image_root / sample.images[0].path) if sample.images else "",
            hallucinated=tuple(result.wrong_words.get(sample.sample_id, ())),
        )
        for sample in samples
    )  # fmt: skip
    return Evaluation(
        trial=config.key, config=config.model_dump(mode="json"), evaluation=evaluation.model_dump(mode="json"),
        metric=result.metric, unit=task.unit, value=result.value,
        metrics={result.metric: result.value, **result.metrics}, details=as_written(result.details),
        num_samples=len(samples), seconds=seconds, found=as_written(parts[0].found), predictions=tuple(predictions),
    )  # fmt: skip


def asked(config: TrialConfig, evaluation: EvaluationConfig, manifest: Manifest) -> Sequence[Sample]:
    """Return the samples that a trial answers; a last batch that is not full is left out where the protocol says so.

    Of fewer samples than one batch none is left out.
    """
    samples = _samples(manifest, evaluation)
    size = evaluation.drop_incomplete_batch
    if size is None or methods.is_trained(config.method) or not baselines.get(config.method).shows_demonstrations:
        return samples
    return samples[: len(samples) // size * size] or samples


def _samples(manifest: Manifest, evaluation: EvaluationConfig) -> Sequence[Sample]:
    return manifest.splits[evaluation.split][: evaluation.num_samples]


def fitted(config: TrialConfig, resident: Resident, manifest: Manifest, *, batch_size: int = 64) -> Baseline:
    """Return a trial's method without training, ready to show demonstrations and to edit the resident model.

    Args:
        config: the trial.
        resident: its backbone.
        manifest: its samples; the evaluation split is read only where the trial selects on it (`selection: test`).
        batch_size: prompts generated at once where a layer is chosen.
    """
    method = baselines.get(config.method)(methods.options(config))
    method.fit(
        Setting(
            host=resident,
            manifest=manifest,
            pool=training_samples(manifest, config),
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
    def features(images: Sequence[ImageRef]) -> torch.Tensor:  # a text decoder is never asked, and has none
        return torch.stack(image_features(resident.visual).get(images, manifest.image_root))

    return features


def _scorer(resident: Resident, manifest: Manifest, batch_size: int) -> Callable[[Sequence[Sample]], float]:
    task = of_manifest(manifest)

    def score(samples: Sequence[Sample]) -> float:
        return task.score(samples, predict(resident, manifest, samples, Decoding(batch_size=batch_size))).value

    return score
