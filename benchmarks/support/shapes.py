"""Frozen random models of real architectures in the sizes that a verb measures, and made-up batches for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import backbones
from pipeline.backbones.base import Pixels, merged
from pipeline.backbones.decoder import decoder_of


@dataclass(frozen=True)
class DecoderShape:
    """A Mistral decoder; the default is an eighth of Mistral-7B in width and depth, with heads of 32."""

    hidden: int = 512
    intermediate: int = 1792
    layers: int = 4
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 512


MISTRAL_7B = DecoderShape(4096, 14336, 32, 32, 8, 32002)


def decoder(shape: DecoderShape, *, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Return a frozen decoder with random weights.

    Args:
        shape: its sizes.
        device: where it is made.
        dtype: of the weights.
        seed: of the weights.
    """
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        sliding_window=None, max_position_embeddings=8192, pad_token_id=0,
    )  # fmt: skip
    return made(MistralForCausalLM, config, device=device, dtype=dtype, seed=seed)


def made(model_class: Any, config: Any, *, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a frozen model with random weights, made on its device: 8 billion values are drawn there in seconds."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                model = model_class(config)
        finally:
            torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Workload:
    """A backbone in some size, and the rows that it is fed.

    Attributes:
        backbone: whose configuration and family.
        changes: what differs from the published configuration; empty: full size.
        pixels: shape by name of one image's pixel arguments; a name that ends in `mask` is all seen.
        visual_tokens: of an image.
        text_tokens: of one query with its answer, markers included.
        answer_tokens: of these, the last ones are learned.
        batch: rows.
        dtype: of the weights.
        shots: demonstrations of a teacher and of in-context learning.
    """

    backbone: str
    changes: Mapping[str, Any]
    pixels: Mapping[str, tuple[int, ...]]
    visual_tokens: int
    text_tokens: int
    answer_tokens: int = 4
    batch: int = 2
    dtype: str = "float32"
    shots: int = 8


def _idefics2_pixels(height: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"pixel_values": (1, 3, height, width), "pixel_attention_mask": (1, height, width)}


# An eighth of the width everywhere. The picture is cut so that vision keeps its share of a HiFICL step's FLOPs, 43 %
# (`pipeline.cost` counts both).
_SMALL_DECODER = {
    "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 2048,
}  # fmt: skip
_SMALL_TOWER = {"hidden_size": 144, "intermediate_size": 538, "num_attention_heads": 4, "num_hidden_layers": 4}
CPU = {
    "idefics2": Workload(
        "idefics2-8b-base",
        {
            "image_token_id": 2047,
            "vision_config": _SMALL_TOWER,
            "perceiver_config": {
                "hidden_size": 512, "resampler_head_dim": 32, "resampler_n_heads": 8, "num_key_value_heads": 2,
                "resampler_depth": 1,
            },
            "text_config": _SMALL_DECODER,
        },
        _idefics2_pixels(280, 364), visual_tokens=64, text_tokens=26,
    ),
    "llava": Workload(
        "llava-interleave-7b",
        {
            "image_token_index": 2047,
            "vision_config": {**_SMALL_TOWER, "image_size": 224},
            "text_config": {**_SMALL_DECODER, "intermediate_size": 1376, "num_key_value_heads": 8},
        },
        {"pixel_values": (3, 224, 224)}, visual_tokens=256, text_tokens=26, shots=2,
    ),
}  # fmt: skip
CUDA = {
    "idefics2": Workload(
        "idefics2-8b-base", {}, _idefics2_pixels(480, 640), visual_tokens=64, text_tokens=26, dtype="bfloat16"
    ),
    "llava": Workload(
        "llava-interleave-7b", {}, {"pixel_values": (3, 384, 384)}, visual_tokens=729, text_tokens=26, dtype="bfloat16"
    ),
}
WORKLOADS = {"cpu": CPU, "cuda": CUDA}


def tiny(work: Workload) -> Workload:
    """Return a workload of the same architecture whose picture has sixteen patches."""
    changes = {
        **work.changes,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1,
            "image_size": 56,
        },
        "text_config": {
            **work.changes["text_config"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
    }  # fmt: skip
    visual = 16
    if "perceiver_config" in changes:
        visual = 4
        changes["perceiver_config"] = {
            **work.changes["perceiver_config"], "hidden_size": 64, "resampler_n_latents": visual,
        }  # fmt: skip
    pixels = {label: (*shape[:-2], 56, 56) for label, shape in work.pixels.items()}
    return replace(work, changes=changes, pixels=pixels, visual_tokens=visual, text_tokens=8, answer_tokens=2, shots=1)


LEASE = {"cpu": {name: tiny(work) for name, work in CPU.items()}, "cuda": CUDA}  # what `hificl bench cuda` measures


class Bench:
    """A workload's model and batches.

    Args:
        workload: what is made.
        device: where.
    """

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload, self.device, self.dtype = workload, device, getattr(torch, workload.dtype)
        facts = backbones.get(workload.backbone)
        self.family = facts.family
        config = self.family.build_config(merged(facts.config_for("published"), workload.changes))
        self.model = made(self.family.model_class, config, device=device, dtype=self.dtype)
        self.spec = decoder_of(self.model)
        self.image_token = int(getattr(config, "image_token_id", None) or config.image_token_index)
        self.generator = torch.Generator().manual_seed(1)
        self.image = self._image()
        with torch.no_grad():
            self.visual = self.family.encode_images(self.model, [self.image])[0]

    def ids(self, shots: int = 0) -> Tensor:
        """Return token ids [B, T] of `shots` demonstrations and a query, each an image and its text."""
        work = self.workload
        turn = work.visual_tokens + work.text_tokens
        top = min(int(self.spec.text_config.vocab_size), self.image_token) - 1
        ids = torch.randint(10, top, (work.batch, (shots + 1) * turn), generator=self.generator)
        for shot in range(shots + 1):
            ids[:, shot * turn : shot * turn + work.visual_tokens] = self.image_token
        return ids.to(self.device)

    def inputs(self, ids: Tensor, *, pixels: bool = False) -> dict[str, Any]:
        """Return the model's arguments: with visual tokens at hand, or with pixels for the vision tower."""
        work = self.workload
        count = ids.shape[1] // (work.visual_tokens + work.text_tokens)
        rows: Sequence[Sequence[Pixels]] = [[self.image] * count] * len(ids)
        arguments = self.family.image_arguments(
            visual=None if pixels else [self.visual] * (count * len(ids)),
            pixels=self.family.stack(rows) if pixels else None,
            input_ids=ids, image_counts=[count] * len(ids), image_token_id=self.image_token,
        )  # fmt: skip
        return {"input_ids": ids, **{name: value for name, value in arguments.items() if value is not None}}

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the last hidden states [B, T, D]."""
        return self.model.model(**inputs, use_cache=False).last_hidden_state

    def _image(self) -> Pixels:
        drawn = {
            name: torch.ones(shape, dtype=torch.bool)
            if name.endswith("mask")
            else torch.randn(shape, generator=self.generator).to(self.dtype)
            for name, shape in self.workload.pixels.items()
        }
        return {name: value.to(self.device) for name, value in drawn.items()}
