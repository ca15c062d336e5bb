"""FLOPs of an image's way through vision tower and connector, by formula, and the tokens that it becomes.

With P patches, W the values of the tower's linear modules and patch embedding, L layers of width D:

    tower      = 2 W P + 4 L D P^2
    projector  = 2 W P
    perceiver  = 2 W_projection P + per layer 2 (W_k + W_v) (P + N) + 2 (W_q + W_o + W_mlp) N + 4 H d N (P + N)
                 for N latents
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.backbones.base import Backbone
from pipeline.core.errors import InputError, nearest
from pipeline.cost.flops import linear_values

TYPICAL_PICTURE = (480, 640)  # height and width of most COCO images


@dataclass(frozen=True)
class ImageCost:
    """One image: its patches, the tokens that it becomes, and the FLOPs of tower and connector.

    Attributes:
        patches: P.
        tokens: visual tokens.
        linear: FLOPs of the linear products, forward.
        scores: FLOPs of the products with score matrices, forward.
    """

    patches: int
    tokens: int
    linear: float
    scores: float

    @property
    def forward(self) -> float:
        """FLOPs of an image's forward pass."""
        return self.linear + self.scores

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass to activations, which a method that trains the tower needs."""
        return self.linear + 2.0 * self.scores


def image_cost(backbone: Backbone, model: Any, height: int | None = None, width: int | None = None) -> ImageCost:
    """Return what an image costs.

    Args:
        backbone: the facts.
        model: its model, on any device.
        height: pixels that the tower is fed; None: of a typical picture, as the backbone's processor would have it.
        width: likewise.

    Raises:
        InputError: no formula for this architecture.
    """
    kind = backbone.family.model_type
    if kind not in _ARCHITECTURES:
        raise InputError(f"no cost formula for vision of type '{kind}'", way_out=nearest(kind, _ARCHITECTURES))
    sized, connect = _ARCHITECTURES[kind]
    if height is None or width is None:
        height, width = sized(backbone)
    settings = model.config.vision_config
    patches = (height // settings.patch_size) * (width // settings.patch_size)
    tower = model.get_submodule(backbone.modules.vision)
    convolution = sum(m.weight.numel() for m in tower.modules() if isinstance(m, nn.Conv2d))
    linear = 2.0 * (linear_values(tower) + convolution) * patches
    scores = 4.0 * settings.num_hidden_layers * settings.hidden_size * patches * patches
    connector = [model.get_submodule(name) for name in backbone.modules.connector]
    tokens, more_linear, more_scores = connect(model, connector, patches)
    return ImageCost(patches, tokens, linear + more_linear, scores + more_scores)


def _native(backbone: Backbone) -> tuple[int, int]:
    """Pictures keep their size: the typical one lies within the processor's bounds."""
    del backbone
    return TYPICAL_PICTURE


def _square(backbone: Backbone) -> tuple[int, int]:
    size = backbone.processor["image_processor"]["size"]
    return size["height"], size["width"]


def _projector(model: Any, connector: list[nn.Module], patches: int) -> tuple[int, float, float]:
    del model
    return patches, 2.0 * sum(linear_values(part) for part in connector) * patches, 0.0


def _perceiver(model: Any, connector: list[nn.Module], patches: int) -> tuple[int, float, float]:
    settings = model.config.perceiver_config
    latents, heads = settings.resampler_n_latents, settings.resampler_n_heads * settings.resampler_head_dim
    (whole,) = connector
    resampler: Any = whole.get_submodule("perceiver_resampler")
    linear, scores = 2.0 * linear_values(whole.get_submodule("modality_projection")) * patches, 0.0
    for layer in resampler.layers:
        wide = layer.self_attn.k_proj.weight.numel() + layer.self_attn.v_proj.weight.numel()
        linear += 2.0 * wide * (patches + latents) + 2.0 * (linear_values(layer) - wide) * latents
        scores += 4.0 * heads * latents * (patches + latents)
    return latents, linear, scores


_Connect = Callable[[Any, list[nn.Module], int], tuple[int, float, float]]
_ARCHITECTURES: dict[str, tuple[Callable[[Backbone], tuple[int, int]], _Connect]] = {
    "idefics2": (_native, _perceiver),
    "llava": (_square, _projector),
}
