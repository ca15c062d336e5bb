"""What a method does inside the model: its states beside in-context learning's, and who attends to virtual tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline import adapters, methods
from pipeline.adapters.base import AttentionAdapter, parts_of
from pipeline.adapters.pack import Pack, PackRows
from pipeline.backbones.decoder import decoder_of, told
from pipeline.backbones.passes import bytes_of_row
from pipeline.backbones.states import recorded
from pipeline.config.trial import State
from pipeline.data.manifest import Manifest, training_samples
from pipeline.data.sample import Sample
from pipeline.evaluate.score import fitted
from pipeline.measure import Measure, Measured, MeasureJob, measures
from pipeline.prompts.prompt import Encoded, draw_demos
from pipeline.records.evaluation import LayerValues
from pipeline.resident.resident import Resident
from pipeline.train.selection import answer_losses
from pipeline.train.workbench import Workbench

_BATCH = 16


@measures.register
class LatentDistance(Measure):
    """mean over samples x and layers l of || h_l(x) - h_l([k demonstrations ; x]) ||_2; by layer: over samples alone.

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
    revision: ClassVar[int] = 3  # 1: visual tokens of the tower without its adapter; 2: no values by layer

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Measured]:
        """Return each job's distance to the same in-context states."""
        targets: dict[tuple[Any, ...], Tensor] = {}
        distances: list[Measured] = []
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
                pixels = methods.facts(config).trains_vision
                states = _states(self.point, resident, manifest, samples, shown, pixels=pixels)
            of_layers = (states - targets[key]).norm(dim=-1).mean(0)
            layers = LayerValues(by_layer={self.name: tuple(of_layers.tolist())})
            distances.append(Measured({self.name: of_layers.mean().item()}, layers))
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
    point: State, resident: Resident, manifest: Manifest, samples: Sequence[Sample],
    shots: Sequence[Sequence[Sample]], *, pixels: bool = False,
) -> Tensor:  # fmt: skip
    """Return the states at the last prompt token, [N, L, D], in fp32; `pixels`: the vision tower is adapted too."""
    loaded = resident.loaded
    encoded = resident.prompts(manifest, samples, shots, answer=False)
    spec = decoder_of(loaded.model)

    def of_rows(rows: Sequence[Encoded]) -> list[Tensor]:
        batch = resident.batch(rows, manifest, pixels=pixels, side="left")
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


@measures.register
class VirtualTokens(Measure):
    """Who attends to an adapter's virtual tokens, and what the answers lose without them.

    The share of a token is Z1 / (Z1 + Z2), what its softmax gives to virtual tokens (HiFICL Eq. 1, MimIC's mu), mean
    over layers and heads: `virtual_share` over all tokens of question and answer, `_images` and `_text` over those
    kinds, `_answer` where the first answer token is generated from. `loss` is the cross-entropy of the answers;
    `loss_without_one` without the virtual token that is missed most (the i-th of every head and layer is removed at
    once), `loss_without_layer` without those of the layer that is missed most, `loss_without_all` without any.
    By layer: each layer's shares, and the loss without it; by layer and token: the share of the i-th, mean over heads.
    """

    name = "virtual_tokens"
    num_samples: int = Field(200, ge=1)
    metric: ClassVar[str | None] = "virtual_share"
    units: ClassVar[dict[str, str]] = {
        "virtual_share": "fraction", "virtual_share_images": "fraction", "virtual_share_text": "fraction",
        "virtual_share_answer": "fraction", "loss": "nats", "loss_without_one": "nats", "loss_without_layer": "nats",
        "loss_without_all": "nats",
    }  # fmt: skip
    revision: ClassVar[int] = 2  # 1: no values by layer

    def run(self, bench: Workbench, jobs: Sequence[MeasureJob]) -> list[Measured]:
        """Return each job's shares and losses; nothing for methods without virtual tokens."""
        return [self._of(job, bench.resident(job.request)) for job in jobs]

    def _of(self, job: MeasureJob, resident: Resident) -> Measured:
        config, model = job.request.config, resident.loaded.model
        if not methods.is_trained(config.method):
            return Measured({})
        adapter = adapters.load(Path(job.request.folder) / "adapter", model)
        if not any(parts_of([adapter], AttentionAdapter)):
            return Measured({})
        manifest = resident.manifest(job.request)
        samples, pixels = manifest.splits[job.evaluation.split][: self.num_samples], adapter.facts.trains_vision
        with adapters.attach(model, adapter.eval()) as pack:
            shares = _shares(resident, manifest, samples, pack, pixels)
            layers, tokens = shares["virtual_share"].shape

            def loss(absent: Tensor | None) -> float:
                pack.without = absent
                losses = answer_losses(resident, manifest, samples, pack, pixels=pixels)
                return sum(losses.values()) / len(losses)

            every = torch.ones(layers, tokens, dtype=torch.bool)
            without_one = [loss(every & (torch.arange(tokens) == i)) for i in range(tokens)]
            without_layer = [loss(every & (torch.arange(layers) == i)[:, None]) for i in range(layers)]
            by_layer = {name: tuple(share.sum(-1).tolist()) for name, share in shares.items()}
            by_token = {name: tuple(map(tuple, share.tolist())) for name, share in shares.items()}
            numbers = {name: share.sum(-1).mean().item() for name, share in shares.items()} | {
                "loss": loss(None), "loss_without_one": max(without_one), "loss_without_layer": max(without_layer),
                "loss_without_all": loss(every),
            }  # fmt: skip
            by_layer["loss_without_layer"] = tuple(without_layer)
            return Measured(numbers, LayerValues(by_layer=by_layer, by_token=by_token))


@torch.no_grad()
def _shares(
    resident: Resident, manifest: Manifest, samples: Sequence[Sample], pack: Pack, pixels: bool
) -> dict[str, Tensor]:
    """Return the share of each virtual token by kind of token that attends, [L, n], mean over heads and tokens."""
    loaded, prompts = resident.loaded, resident.alone(manifest, samples, answer=True)

    def of_rows(rows: Sequence[Encoded]) -> list[tuple[Tensor, Tensor]]:
        """Return of every row the sum of the shares, [kinds, L, n], and how many tokens there are, [kinds]."""
        batch = resident.batch(rows, manifest, pixels=pixels)
        places = torch.arange(batch.input_ids.shape[1])
        real = places < batch.lengths[:, None]
        images = batch.input_ids.cpu() == loaded.image_token_id
        first = (batch.labels != -100).int().argmax(1)[:, None]  # of the answer
        kinds = torch.stack([real, real & images, real & ~images, places == first - 1], 1).double()
        sums: dict[int, Tensor] = {}  # by layer: what virtual tokens weigh is [B, H, T, n], too much to keep

        def note(layer: int, weights: Tensor) -> None:
            sums[layer] = torch.einsum("bkt,btn->bkn", kinds, weights.double().mean(1).cpu())

        pack.watch = note
        pack.use(PackRows((0,) * len(batch), batch.image_counts))
        with told(resident.device, padded=False):
            loaded.model.model(**batch.model_inputs(loaded), use_cache=False)
        of_layers = torch.stack([sums[layer] for layer in sorted(sums)], 2)
        return list(zip(of_layers, kinds.sum(-1), strict=True))

    totals: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(prompts), _BATCH):
        rows = loaded.passes.run(
            "virtual tokens", prompts[start : start + _BATCH], of_rows, width=len, device=loaded.device,
            bytes_of=lambda tokens: bytes_of_row(loaded.model, tokens, caches=0),
        )  # fmt: skip
        totals.append((torch.stack([row[0] for row in rows]).sum(0), torch.stack([row[1] for row in rows]).sum(0)))
    pack.watch = None
    shares, counts = (torch.stack(parts).sum(0) for parts in zip(*totals, strict=True))
    names = ("virtual_share", "virtual_share_images", "virtual_share_text", "virtual_share_answer")
    return {name: of / count for name, of, count in zip(names, shares, counts, strict=True) if count}
