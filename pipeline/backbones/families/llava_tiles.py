"""LLaVA-NeXT and LLaVA-OneVision: an image as an overview and, by its size, tiles; a learnt newline ends a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import override

from pipeline.backbones.base import Family, Pixels, SizeRule, replace_in_order
from pipeline.backbones.families.tokenizers import llama_tokenizer, qwen2_tokenizer
from pipeline.data.images import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image


class _Tiled(Family):
    token_keys: ClassVar = {"image_token_index": "image"}

    @override
    def stack(self, rows: Sequence[Sequence[Pixels]]) -> Pixels:
        images = [image for row in rows for image in row]
        tiles = [image["pixel_values"] for image in images]
        pixels = tiles[0].new_zeros(len(tiles), max(len(t) for t in tiles), *tiles[0].shape[1:])
        for i, tile in enumerate(tiles):
            pixels[i, : len(tile)] = tile
        return {"pixel_values": pixels, "image_sizes": torch.stack([image["image_sizes"] for image in images])}


class LlavaNextFamily(_Tiled):
    """LlavaNextForConditionalGeneration (v1.6) with CLIP and Mistral; every image has its tiles."""

    model_type = "llava_next"
    sized = True
    config_name = "LlavaNextConfig"
    model_name = "LlavaNextForConditionalGeneration"
    processor_name = "LlavaNextProcessor"
    image_processor_name = "LlavaNextImageProcessorPil"

    @override
    def train_tokenizer(self, lines: Sequence[str], special: Mapping[str, str]) -> Any:
        return llama_tokenizer(lines, special)

    @override
    def build_processor(self, tokenizer: Any, settings: Mapping[str, Any]) -> Any:
        images = self.image_processor_class(**settings["image_processor"])
        own = {key: value for key, value in settings.items() if key != "image_processor"}
        return self.processor_class(images, tokenizer, **own)

    @override
    def expand(self, text: str, processor: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> str:
        side = processor.image_processor.crop_size
        dropped = processor.vision_feature_select_strategy == "default"  # the tower's class token
        counts = [
            processor._get_number_of_features(height, width, side["height"], side["width"]) - dropped
            for height, width in image_sizes or ()
        ]
        return replace_in_order(text, processor.image_token, counts)

    @override
    def process(self, processor: Any, image: Image.Image) -> Pixels:
        out = processor.image_processor(image, return_tensors="pt")
        return {"pixel_values": out["pixel_values"][0], "image_sizes": out["image_sizes"][0]}


class LlavaOnevisionFamily(_Tiled):
    """LlavaOnevisionForConditionalGeneration with SigLIP and Qwen2.

    Every image is read as one of several images of a prompt are: padded to a square, one overview, no tiles (730
    tokens). The published processor tiles an image that is alone in its prompt (1,485 to 7,269 tokens); then an image
    would look different with demonstrations and without, and zero-shot and k-shot would not compare like with like.
    """

    model_type = "llava_onevision"
    size_rules: ClassVar = (
        SizeRule(
            f"LLaVA-OneVision pads a picture to a square, which may have {MAX_PIXELS} pixels",
            lambda height, width: max(height, width) ** 2 <= MAX_PIXELS,
        ),
    )
    token_keys: ClassVar = {"image_token_index": "image", "video_token_index": "video"}
    config_name = "LlavaOnevisionConfig"
    model_name = "LlavaOnevisionForConditionalGeneration"
    processor_name = "LlavaOnevisionProcessor"
    image_processor_name = "LlavaOnevisionImageProcessorPil"

    @override
    def train_tokenizer(self, lines: Sequence[str], special: Mapping[str, str]) -> Any:
        return qwen2_tokenizer(lines, special)

    @override
    def build_processor(self, tokenizer: Any, settings: Mapping[str, Any]) -> Any:
        from transformers import LlavaOnevisionVideoProcessor  # the processor class insists on one; torchvision only

        images = self.image_processor_class(**settings["image_processor"])
        own = {key: value for key, value in settings.items() if key != "image_processor"}
        return self.processor_class(images, tokenizer, LlavaOnevisionVideoProcessor(), **own)

    @override
    def expand(self, text: str, processor: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> str:
        tokens = processor.num_image_tokens + 1  # the newline
        if processor.vision_feature_select_strategy == "default":
            tokens -= 1
        return text.replace(processor.image_token, processor.image_token * tokens)

    @override
    def process(self, processor: Any, image: Image.Image) -> Pixels:
        # Shown twice in one prompt, so that the processor takes it as one of several.
        out = processor.image_processor([[image, image]], return_tensors="pt")
        return {"pixel_values": out["pixel_values"][0][:1], "image_sizes": out["image_sizes"][0]}

    @override
    def stack(self, rows: Sequence[Sequence[Pixels]]) -> Pixels:
        stacked = super().stack(rows)
        # One "prompt" of at least two images: transformers tiles an image that is alone in its prompt.
        return {**stacked, "batch_num_images": torch.tensor([max(2, len(stacked["image_sizes"]))])}
