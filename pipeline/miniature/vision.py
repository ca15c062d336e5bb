"""First phase of pre-training: the vision tower and connector learn to name what an image shows.

A linear head reads all eight attributes off the visual tokens and is thrown away afterwards. A second one
reads them off the vision tower itself: without it the tower learns through an untrained connector, and a
resampler makes that three times slower. Poor vision makes everything after it poor, so this phase runs
until about 99 % of the attributes are right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.core.progress import Report
from pipeline.miniature.lexicon import ATTRIBUTES, NUM_VALUES
from pipeline.miniature.model import Miniature, encode_images, normalise
from pipeline.miniature.render import NOISE, draw_attributes, render_images
from pipeline.miniature.unfinished import Phase, Unfinished

_CHUNK = 2000


@dataclass(frozen=True)
class Pool:
    """Images to learn from: attributes [N, 8] and pixels uint8 [N, 32, 32, 3]."""

    attributes: Tensor
    images: Tensor

    @classmethod
    def draw(cls, size: int, rng: np.random.Generator, noise: int = NOISE) -> Pool:
        """Draw `size` images whose pixels are moved by `noise` at most, of 255."""
        attributes = draw_attributes(size, rng)
        chunks = [attributes[at : at + _CHUNK] for at in range(0, size, _CHUNK)]
        images = np.concatenate([render_images(chunk, rng, noise) for chunk in chunks])
        return cls(torch.from_numpy(attributes), torch.from_numpy(images))


@dataclass(frozen=True)
class VisionPhase:
    """How the vision phase runs; batch 64 because progress is limited by the number of steps."""

    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    pixel_noise: float = 0.03
    log_every: int = 500


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Return the factor of the learning rate: linear warm-up, then a cosine from 1 down to `floor`."""
    decay = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * decay


def train_vision(
    spec: Miniature,
    model: PreTrainedModel,
    pool: Pool,
    held_out: Pool,
    phase: VisionPhase,
    rng: np.random.Generator,
    progress: Report,
    unfinished: Unfinished,
) -> None:
    """Train vision tower and connector of `model` in place; `unfinished` has the curve.

    Its records have `step`, `loss` (mean since the last one, nats an attribute) and `accuracy` (fraction of the
    held-out attributes named right, also by attribute).
    """
    device = model.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        shapes = [part[0].numel() for part in encode_images(spec, model, normalise(pool.images[:1]).to(device))]
        heads = nn.ModuleList([nn.Linear(width, sum(NUM_VALUES)) for width in shapes]).to(device)
    noise = torch.Generator().manual_seed(int(rng.integers(2**31)))
    parameters = [p for name, p in model.named_parameters() if spec.is_visual(name)] + list(heads.parameters())
    optimiser = torch.optim.AdamW(
        parameters, lr=phase.learning_rate, weight_decay=phase.weight_decay, betas=(0.9, 0.98)
    )
    here = Phase("vision", [model, heads], optimiser, rng, noise)
    unfinished.restore(here)
    losses: list[float] = []
    model.train()
    for step in range(here.step, phase.steps):
        for group in optimiser.param_groups:
            group["lr"] = phase.learning_rate * cosine(step, phase.steps, phase.warmup_steps, floor=0.02)
        chosen = torch.from_numpy(rng.integers(len(pool.images), size=phase.batch_size))
        pixels = normalise(pool.images[chosen])
        pixels = pixels + phase.pixel_noise * torch.randn(pixels.shape, generator=noise)
        encoded, truth = encode_images(spec, model, pixels.to(device)), pool.attributes[chosen].to(device)
        by_tokens, by_tower = (_loss(head(part.flatten(1)), truth) for head, part in zip(heads, encoded, strict=True))
        loss = by_tokens + by_tower
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        here.step = step + 1
        losses.append(by_tokens.item())
        if (step + 1) % phase.log_every == 0 or step + 1 == phase.steps:
            accuracy = _accuracy(spec, model, heads[0], held_out)
            record = {
                "step": step + 1,
                "loss": float(np.mean(losses)),
                "accuracy": float(np.mean(accuracy)),
                "by_attribute": dict(zip([a.name for a in ATTRIBUTES], accuracy, strict=True)),
            }
            unfinished.keep(here, record)
            losses.clear()
            progress(
                step + 1,
                phase.steps,
                f"vision: loss {record['loss']:.3f}, accuracy {record['accuracy']:.3f} (worst {min(accuracy):.3f})",
            )


def cache_visual_tokens(spec: Miniature, model: PreTrainedModel, images: Tensor, chunk: int = 500) -> Tensor:
    """Return the visual tokens [N, visual_tokens, d] of uint8 images, in fp16 (what later steps read)."""
    model.eval()
    with torch.no_grad():
        parts = [encode_images(spec, model, normalise(part).to(model.device))[0] for part in images.split(chunk)]
    return torch.cat(parts).half()


def _loss(logits: Tensor, attributes: Tensor) -> Tensor:
    parts = logits.split(list(NUM_VALUES), dim=1)
    return torch.stack([F.cross_entropy(part, attributes[:, nth]) for nth, part in enumerate(parts)]).mean()


def _accuracy(spec: Miniature, model: PreTrainedModel, head: nn.Module, pool: Pool) -> list[float]:
    model.eval()
    with torch.no_grad():
        logits = head(encode_images(spec, model, normalise(pool.images).to(model.device))[0].flatten(1)).cpu()
    model.train()
    parts = logits.split(list(NUM_VALUES), dim=1)
    return [float((part.argmax(1) == pool.attributes[:, nth]).float().mean()) for nth, part in enumerate(parts)]
