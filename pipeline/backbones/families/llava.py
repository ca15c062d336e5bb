"""LLaVA: a vision tower at one fixed size, a two-layer projector, any decoder (Qwen2 in LLaVA-Interleave)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import override

from pipeline.backbones.base import Family, Pixels
from pipeline.backbones.families.tokenizers import qwen2_tokenizer

if TYPE_CHECKING:
    from PIL import Image


class LlavaFamily(Family):
    """LlavaForConditionalGeneration with a SigLIP tower; an image is as many `<image>` tokens as it has patches."""

    model_type = "llava"
    token_keys: ClassVar = {"image_token_index": "image"}
    config_name = "LlavaConfig"
    model_name = "LlavaForConditionalGeneration"
    processor_name = "LlavaProcessor"
    image_processor_name = "SiglipImageProcessorPil"

    @override
    def train_tokenizer(self, lines: Sequence[str], special: Mapping[str, str]) -> Any:
        return qwen2_tokenizer(lines, special)

    @override
    def build_processor(self, tokenizer: Any, settings: Mapping[str, Any]) -> Any:
        images = self.image_processor_class(**settings["image_processor"])
        own = {key: value for key, value in settings.items() if key != "image_processor"}
        return self.processor_class(images, tokenizer, **own)

    @override
    def load_processor(self, folder: Path, settings: Mapping[str, Any]) -> Any:
        processor = super().load_processor(folder, settings)
        # Older published processor files lack these, and the class's own default is None.
        if processor.patch_size is None:
            processor.patch_size = settings["patch_size"]
        if processor.vision_feature_select_strategy is None:
            processor.vision_feature_select_strategy = settings["vision_feature_select_strategy"]
        return processor

    @override
    def expand(self, text: str, processor: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> str:
        size = processor.image_processor.size
        patch = processor.patch_size
        tokens = (size["height"] // patch) * (size["width"] // patch) + processor.num_additional_image_tokens
        if processor.vision_feature_select_strategy == "default":
            tokens -= 1
        return text.replace(processor.image_token, processor.image_token * tokens)

    @override
    def process(self, processor: Any, image: Image.Image) -> Pixels:
        return {"pixel_values": processor.image_processor(image, return_tensors="pt")["pixel_values"][0]}

    @override
    def stack(self, rows: Sequence[Sequence[Pixels]]) -> Pixels:
        return {"pixel_values": torch.stack([image["pixel_values"] for row in rows for image in row])}
