"""Idefics and Idefics2: a perceiver makes 64 latents or tokens of an image.

Idefics has CLIP and gated cross-attention from a Llama decoder to the latents, which never enter the text: an image is
one token there, and a mask says which images a position looks at. Idefics2 has SigLIP at native aspect ratio, and its
tokens stand in the text of a Mistral decoder.
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


class Idefics2Family(Family):
    """Idefics2ForConditionalGeneration; an image is `<fake><image>...<image><fake>` in the text."""

    model_type = "idefics2"
    architecture = "Idefics2"
    image_processor_name = "Idefics2ImageProcessorPil"
    train_tokenizer = staticmethod(llama_tokenizer)
    modules = Modules(vision="model.vision_model", connector=("model.connector",))

    @override
    def expand(self, text: str, processor: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> str:
        fake, image = processor.fake_image_token, processor.image_token
        block = f"{fake}{image * processor.image_seq_len}{fake}"
        if processor.image_processor.do_image_splitting:
            block *= 5  # four quarters and the whole
        text = text.replace(image, block).replace(fake * 2, fake)  # neighbours share one fake token
        # A word right after the closing fake token is set off by a space.
        return re.sub(rf"{re.escape(fake)}(?=[^\s<])", f"{fake} ", text)

    @override
    def process(self, processor: Any, image: Image.Image) -> Pixels:
        out = processor.image_processor([[image]], return_tensors="pt")
        pixels = out["pixel_values"][0]  # [1 or 5 with splitting, 3, H, W]
        return {"pixel_values": pixels, "pixel_attention_mask": out["pixel_attention_mask"][0].bool()}

    @override
    def stack(self, rows: Sequence[Sequence[Pixels]]) -> Pixels:
        parts = [[tile for image in row for tile in _tiles(image)] for row in rows]
        width = max(len(row) for row in parts)
        height_px = max(pixels.shape[-2] for row in parts for pixels, _ in row)
        width_px = max(pixels.shape[-1] for row in parts for pixels, _ in row)
        first = next(pixels for row in parts for pixels, _ in row)
        pixel_values = first.new_zeros(len(rows), width, 3, height_px, width_px)
        mask = torch.zeros(len(rows), width, height_px, width_px, dtype=torch.bool, device=first.device)
        for b, row in enumerate(parts):
            for i, (pixels, seen) in enumerate(row):
                pixel_values[b, i, :, : pixels.shape[-2], : pixels.shape[-1]] = pixels
                mask[b, i, : seen.shape[-2], : seen.shape[-1]] = seen
        return {"pixel_values": pixel_values, "pixel_attention_mask": mask}


def _tiles(image: Pixels) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(image["pixel_values"], image["pixel_attention_mask"], strict=True))
