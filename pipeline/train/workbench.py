"""What a resident process does: admit a trial, advance it by an epoch, drop it; and score a trained one."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from pipeline import adapters, methods
from pipeline.baselines import baselines
from pipeline.evaluate.predict import predict
from pipeline.request import TrialRequest
from pipeline.tasks import tasks
from pipeline.train.resident import Resident, Residents
from pipeline.train.run import Report, TrialRun
from pipeline.trial import EvaluationConfig


def use_threads() -> None:
    """Let torch use the threads that this process was given, no more."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


class Workbench:
    """Trains one trial after another with the backbone resident.

    Args:
        device: where models go; None: a GPU if there is one.
        batch_size: prompts generated at once.
        keep: backbones kept in memory.
    """

    def __init__(self, device: str | None = None, batch_size: int = 64, keep: int = 1) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size
        self.residents = Residents(self.device, keep)
        self.run: TrialRun | None = None
        self.steps = 0  # counts up while work goes on

    def resident(self, request: TrialRequest) -> Resident:
        """Return the resident backbone of a trial."""
        return self.residents.get(request.config, request.source, Path(request.cache) if request.cache else None)

    def admit(self, request: TrialRequest) -> int:
        """Take a trial up at its last checkpoint; return the epochs that it has behind it."""
        if self.run is not None:
            self.evict(self.run.config.key)
        resident = self.resident(request)
        manifest = resident.manifest(Path(request.manifest), request.config.manifest_digest)
        self.run = TrialRun(request.config, Path(request.folder), resident, manifest, self._count)
        return self.run.epochs_done

    def advance(self) -> list[Report]:
        """Train an epoch of the admitted trial; return its report."""
        if self.run is None:
            return []
        report = self.run.closed_report() if self.run.finished else self.run.epoch()
        if report["done"]:
            self.evict(self.run.config.key)
        return [report]

    def evict(self, key: str) -> None:
        """Drop the trial `key`."""
        if self.run is not None and self.run.config.key == key:
            self.run.close()
            self.run = None

    def _count(self) -> None:
        self.steps += 1

    def score(self, request: TrialRequest, evaluation: EvaluationConfig) -> dict[str, Any]:
        """Score a trial on a split: with its adapter, or as the method without training that it is."""
        started = time.perf_counter()
        config = request.config
        resident = self.resident(request)
        manifest = resident.manifest(Path(request.manifest), config.manifest_digest)
        samples = manifest.splits[evaluation.split][: evaluation.num_samples]
        model = resident.loaded.model
        demonstrations = None
        context: AbstractContextManager[object] = nullcontext()
        if methods.is_trained(config.method):
            context = adapters.attach(model, adapters.load(Path(request.folder) / "adapter", model))
        else:
            schema = baselines.get(config.method)
            method = schema(schema.Options.checked(config.options, config.method))
            pool = manifest.splits["train"][: config.num_train_samples]
            demonstrations = lambda sample: method.demonstrations(sample, pool, config.seed)  # noqa: E731
        with context:
            texts = predict(
                resident, manifest, samples, demonstrations=demonstrations, max_new_tokens=evaluation.max_new_tokens,
                num_beams=evaluation.num_beams, length_penalty=evaluation.length_penalty, batch_size=self.batch_size,
                from_pixels=methods.facts_of(config.method, config.options).trains_vision,
            )  # fmt: skip
        task = tasks.get(config.task)
        score = task.score(samples, texts, normalise=evaluation.vqa_normalise)
        return {
            "trial": config.key, "config": config.model_dump(mode="json"),
            "evaluation": evaluation.model_dump(mode="json"),
            "metric": score.metric, "unit": task.unit, "value": score.value, "metrics": {score.metric: score.value},
            "details": score.details, "num_samples": len(samples), "seconds": time.perf_counter() - started,
            "predictions": [
                {
                    "sample_id": s.sample_id, "prediction": texts[s.sample_id],
                    "score": score.per_sample.get(s.sample_id), "question": s.question,
                    "references": list(s.references), "image": str(manifest.image_root / s.images[0].path),
                }
                for s in samples
            ],
        }  # fmt: skip
