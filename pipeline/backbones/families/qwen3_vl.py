"""Qwen3-VL: a tower at native size, patches merged two by two, three further feature maps added inside the decoder.

Positions are three-dimensional (M-RoPE): an image's visual tokens keep their grid, so they are stored as
[H/2, W/2, 4 D]: the merged patches and the three maps for decoder layers 0 to 2, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.backbones.base import Family, ModelArguments, Modules, Pixels, SizeRule, replace_in_order
from pipeline.backbones.families.tokenizers import qwen2_tokenizer

if TYPE_CHECKING:
    from PIL import Image


class Qwen3VLFamily(Family):
    """Qwen3VLForConditionalGeneration; an image is `<|vision_start|><|image_pad|>...<|vision_end|>`."""

    model_type = "qwen3_vl"
    shares_prefix = False  # positions are counted from the sizes of all images
    sized = True
    row_a_picture = False  # the patches of all pictures stand in one row
    size_rules: ClassVar = (
        SizeRule(
            "Qwen3-VL reads no picture more than 200 times as wide as high, or as high as wide",
            lambda height, width: max(height, width) <= 200 * min(height, width),
        ),
    )
    token_keys: ClassVar = {
        "image_token_id": "image",
        "video_token_id": "video",
        "vision_start_token_id": "vision_start",
        "vision_end_token_id": "vision_end",
    }
    architecture = "Qwen3VL"
    image_processor_name = "Qwen2VLImageProcessorPil"
    video_processor_name = "Qwen3VLVideoProcessor"
    train_tokenizer = staticmethod(qwen2_tokenizer)
    modules = Modules(
        vision="model.visual",
        connector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    )
    levels: ClassVar[int] = 4  # the merged patches and three feature maps
    merge: ClassVar[int] = 2  # patches a side that become one token

    @override
    def expand(self, text: str, processor: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> str:
        images = processor.image_processor
        counts = [
            images.get_number_of_image_patches(height, width) // images.merge_size**2
            for height, width in image_sizes or ()
        ]
        return replace_in_order(text, processor.image_token, counts)

    @override
    def process(self, processor: Any, image: Image.Image) -> Pixels:
        out = processor.image_processor(image, return_tensors="pt")
        return {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"][0]}

    @override
    def stack(self, rows: Sequence[Sequence[Pixels]]) -> Pixels:
        images = [image for row in rows for image in row]
        return {
            "pixel_values": torch.cat([image["pixel_values"] for image in images]),
            "image_grid_thw": torch.stack([image["image_grid_thw"] for image in images]),
        }

    @override
    def encode_images(self, model: Any, images: Sequence[Pixels]) -> list[Tensor]:
        arguments = self.stack([images])
        merge = model.model.visual.spatial_merge_size
        features = model.get_image_features(**arguments, return_dict=True)
        out = []
        for i, (_, height, width) in enumerate(arguments["image_grid_thw"].tolist()):
            parts = [features.pooler_output[i], *(level[i] for level in features.deepstack_features)]
            out.append(torch.cat(parts, dim=-1).reshape(height // merge, width // merge, -1))
        return out

    @override
    def image_arguments(
        self, *, visual: Sequence[Tensor] | None, pixels: Mapping[str, Tensor] | None, input_ids: Tensor,
        image_counts: Sequence[int], image_token_id: int,
    ) -> ModelArguments:  # fmt: skip
        if visual is None and pixels is None:
            return {}
        # The model numbers the positions itself, in three dimensions.
        common = {"mm_token_type_ids": (input_ids == image_token_id).int(), "position_ids": None}
        if visual is None:
            return {**(pixels or {}), **common}
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        levels = [image.flatten(0, 1).chunk(self.levels, dim=-1) for image in visual]
        merged: Any = [parts[0] for parts in levels]
        maps: Any = [[parts[n] for parts in levels] for n in range(1, self.levels)]
        features = BaseModelOutputWithDeepstackFeatures(pooler_output=merged, deepstack_features=maps)
        grid = [[1, image.shape[0] * self.merge, image.shape[1] * self.merge] for image in visual]
        return {
            "mm_encoder_outputs": {"image": features},
            "image_grid_thw": torch.tensor(grid, device=input_ids.device),
            **common,
        }
