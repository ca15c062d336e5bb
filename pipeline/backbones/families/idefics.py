"""Idefics (first generation): CLIP, a perceiver, and gated cross-attention from a Llama decoder to 64 latents an image.

The latents never enter the text: an image is one token there, and a mask says which images a position looks at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.backbones.base import Family, ModelArguments, Modules, Pixels, merged, vocabulary_size
from pipeline.backbones.families.tokenizers import llama_tokenizer
from pipeline.core.plain_yaml import Json

if TYPE_CHECKING:
    from PIL import Image

FAKE, IMAGE = "<fake_token_around_image>", "<image>"


class IdeficsFamily(Family):
    """IdeficsForVisionText2Text; an image is `<fake><image><fake>` in the text."""

    model_type = "idefics"
    shares_prefix = False  # every token attends to the images through a mask over the whole prompt
    architecture = "Idefics"
    image_processor_name = "IdeficsImageProcessorPil"
    train_tokenizer = staticmethod(llama_tokenizer)
    modules = Modules(
        vision="model.vision_model",
        connector=("model.perceiver_resampler", "model.gated_cross_attn_layers"),
        decoder_layers="model.layers",
    )

    @property
    @override
    def model_name(self) -> str:
        return "IdeficsForVisionText2Text"

    @override
    def fit_vocabulary(self, settings: Mapping[str, Any], tokenizer: Any, special: Mapping[str, str]) -> Json:
        # The image tokens have rows of their own behind the language model's vocabulary.
        extra = settings["additional_vocab_size"]
        return merged(settings, {"vocab_size": vocabulary_size(tokenizer) - extra})

    @override
    def expand(self, text: str, processor: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> str:
        # The processor takes text and images in turn and strips the spaces between them.
        text = re.sub(rf" *{IMAGE} *", f"{FAKE}{IMAGE}{FAKE}", text)
        return text.replace(FAKE * 2, FAKE)

    @override
    def tokenise(self, tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        # The processor writes the start token as text.
        start = tokenizer.bos_token
        out = tokenizer([start + text for text in texts], add_special_tokens=False, return_offsets_mapping=True)
        places = [[(max(a - len(start), 0), max(b - len(start), 0)) for a, b in row] for row in out["offset_mapping"]]
        return out["input_ids"], places

    @override
    def process(self, processor: Any, image: Image.Image) -> Pixels:
        return {"pixel_values": torch.as_tensor(processor.image_processor([image], return_tensors="pt"))[0]}

    @override
    def stack(self, rows: Sequence[Sequence[Pixels]]) -> Pixels:
        return {"pixel_values": _by_row([[image["pixel_values"] for image in row] for row in rows])}

    @override
    def encode_images(self, model: Any, images: Sequence[Pixels]) -> list[Tensor]:
        pixels = torch.stack([image["pixel_values"] for image in images])
        states = model.model.vision_model(pixel_values=pixels).last_hidden_state
        return list(model.model.perceiver_resampler(states))

    @override
    def image_arguments(
        self, *, visual: Sequence[Tensor] | None, pixels: Mapping[str, Tensor] | None, input_ids: Tensor,
        image_counts: Sequence[int], image_token_id: int,
    ) -> ModelArguments:  # fmt: skip
        if visual is None and pixels is None:
            return {}
        # A position looks at the image before it, and at no other: [B, S, I]. Without one the gate is closed.
        nearest = (input_ids == image_token_id).cumsum(1) - 1
        numbers = torch.arange(max(image_counts), device=input_ids.device)
        mask = (nearest[..., None] == numbers).long()
        if visual is None:
            return {**(pixels or {}), "image_attention_mask": mask}
        ends = torch.tensor(image_counts).cumsum(0).tolist()
        rows = [list(visual[end - count : end]) for end, count in zip(ends, image_counts, strict=True)]
        return {"perceiver_embeddings": _by_row(rows), "image_attention_mask": mask}


def _by_row(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return [B, I, ...], rows with fewer images filled up with zeros."""
    first = next(image for row in rows for image in row)
    out = first.new_zeros(len(rows), max(len(row) for row in rows), *first.shape)
    for b, row in enumerate(rows):
        for i, image in enumerate(row):
            out[b, i] = image
    return out
