"""How far a method's latent states are from those of in-context learning (MimIC Table 11)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline import adapters, methods
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.passes import bytes_of_row
from pipeline.backbones.states import recorded
from pipeline.config.trial import State
from pipeline.data.manifest import Manifest, training_samples
from pipeline.data.sample import Sample
from pipeline.evaluate.score import fitted
from pipeline.measure import Measure, MeasureJob, Numbers, measures
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import Encoded, draw_demos
from pipeline.resident.resident import Resident
from pipeline.train.workbench import Workbench

_BATCH = 16


@measures.register
class LatentDistance(Measure):
    """mean over samples x and layers l of || h_l(x) - h_l([k demonstrations ; x]) ||_2.

    h_l is what layer l's FFN gives (`point: mlp`), or the residual stream behind it (`residual`), at the position that
    the first answer token is generated from. The demonstrations are drawn for each query by the trial's seed, the same
    for all rows.
    """

    name = "latent_distance"
    num_shots: int = Field(32, ge=1)
    num_samples: int = Field(200, ge=1)
    point: Literal["mlp", "residual"] = "mlp"
    metric: ClassVar[str | None] = "latent_distance"
    units: ClassVar[dict[str, str]] = {"latent_distance": "l2"}

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Numbers]:
        """Return each job's distance to the same in-context states."""
        targets: dict[tuple[Any, ...], Tensor] = {}
        distances: list[Numbers] = []
        for job in jobs:
            config = job.request.config
            resident = bench.resident(job.request)
            manifest = resident.manifest(job.request)
            samples = manifest.splits[job.evaluation.split][: self.num_samples]
            key = (config.backbone_digest, *config.pool)
            if key not in targets:
                demonstrations = self._demonstrations(job, manifest, samples)
                targets[key] = _states(self.point, resident, manifest, samples, demonstrations)
            with _in_place(job, resident, manifest, samples) as shown:
                states = _states(self.point, resident, manifest, samples, shown)
            distances.append({"latent_distance": (states - targets[key]).norm(dim=-1).mean().item()})
        return distances

    def _demonstrations(self, job: MeasureJob, manifest: Manifest, samples: Sequence[Sample]) -> list[list[Sample]]:
        config = job.request.config
        pool = {sample.sample_id: sample for sample in training_samples(manifest, config)}
        ids = list(pool)
        drawn = (draw_demos(ids, sample.sample_id, self.num_shots, config.seed) for sample in samples)
        return [[pool[sample_id] for sample_id in row] for row in drawn]


@contextmanager
def _in_place(
    job: MeasureJob, resident: Resident, manifest: Manifest, samples: Sequence[Sample]
) -> Iterator[list[list[Sample]]]:
    """Put the method into the model, and give the demonstrations that it shows."""
    config, model = job.request.config, resident.loaded.model
    if methods.is_trained(config.method):
        with adapters.attach(model, adapters.load(Path(job.request.folder) / "adapter", model)):
            yield [[] for _ in samples]
        return
    method = fitted(config, resident, manifest)
    shown = method.demonstrations(samples)
    with method.edited():
        yield shown


@torch.no_grad()
def _states(
    point: State, resident: Resident, manifest: Manifest, samples: Sequence[Sample], shots: Sequence[Sequence[Sample]]
) -> Tensor:
    """Return the states at the last prompt token, [N, L, D], in fp32."""
    loaded, root = resident.loaded, manifest.image_root
    encoded = resident.prompts(manifest, samples, shots, answer=False)
    spec = decoder_of(loaded.model)

    def of_rows(rows: Sequence[Encoded]) -> list[Tensor]:
        visual = resident.visual.get([image for row in rows for image in row.images], root)
        batch = collate(rows, loaded, side="left", visual=visual).to(loaded.device)
        with recorded(spec, point, lambda state: state[:, -1].clone()) as states:
            loaded.model.model(**batch.model_inputs(loaded), use_cache=False)
        return list(torch.stack([state.float().cpu() for state in states], dim=1))

    parts: list[Tensor] = []
    for start in range(0, len(encoded), _BATCH):
        parts += loaded.passes.run(
            "latent distances", encoded[start : start + _BATCH], of_rows, width=len, device=loaded.device,
            bytes_of=lambda tokens: bytes_of_row(loaded.model, tokens, caches=0),
        )  # fmt: skip
    return torch.stack(parts)
