"""Idefics2: SigLIP at native aspect ratio, a perceiver that makes 64 tokens of an image, a Mistral decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from pipeline.backbones.base import Family, Modules, Pixels
from pipeline.backbones.families.tokenizers import llama_tokenizer

if TYPE_CHECKING:
    from PIL import Image


class Idefics2Family(Family):
    """Idefics2ForConditionalGeneration; an image is `<fake><image>...<image><fake>` in the text."""

    model_type = "idefics2"
    architecture = "Idefics2"
    image_processor_name = "Idefics2ImageProcessorPil"
    train_tokenizer = staticmethod(llama_tokenizer)
    modules = Modules(
        vision="model.vision_model", connector=("model.connector",), decoder_layers="model.text_model.layers"
    )

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
