"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a vision tower, a two-layer projector, any decoder.

LLaVA reads an image at one fixed size; the other two as an overview and, by its size, tiles, with a learnt newline at
the end of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import override

from pipeline.backbones.base import Family, Modules, Pixels, SizeRule, replace_in_order
from pipeline.backbones.families.tokenizers import llama_tokenizer, qwen2_tokenizer
from pipeline.data import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image


class _Llava(Family):
    token_keys: ClassVar = {"image_token_index": "image"}
    modules = Modules(vision="model.vision_tower", connector=("model.multi_modal_projector",))


class LlavaFamily(_Llava):
    """LlavaForConditionalGeneration with a SigLIP tower; an image is as many `<image>` tokens as it has patches."""

    model_type = "llava"
    architecture = "Llava"
    image_processor_name = "SiglipImageProcessorPil"
    train_tokenizer = staticmethod(qwen2_tokenizer)

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


class _Tiled(_Llava):
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
    row_a_picture = False  # one a tile
    architecture = "LlavaNext"
    image_processor_name = "LlavaNextImageProcessorPil"
    train_tokenizer = staticmethod(llama_tokenizer)

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
    architecture = "LlavaOnevision"
    image_processor_name = "LlavaOnevisionImageProcessorPil"
    video_processor_name = "LlavaOnevisionVideoProcessor"
    train_tokenizer = staticmethod(qwen2_tokenizer)

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
