"""llava-hf/llava-onevision-qwen2-7b-ov-hf: SigLIP, Qwen2-7B, ChatML turns; one overview an image (see the family).

Traps: normalised with 0.5, not with the class's CLIP values; the processor class needs torchvision for its video part.
"""

from __future__ import annotations

from pipeline.backbones import register
from pipeline.backbones.base import CHATML, Backbone
from pipeline.backbones.families.llava_tiles import LlavaOnevisionFamily
from pipeline.backbones.llava_interleave_7b import LLAVA_MODULES, QWEN_SPECIAL_TOKENS


def _grid(side: int) -> list[list[int]]:
    """Return the 36 resolutions of 1 to 6 by 1 to 6 tiles."""
    return [[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)]


BACKBONE = register(
    Backbone(
        name="llava-onevision-qwen2-7b",
        family=LlavaOnevisionFamily(),
        hub_id="llava-hf/llava-onevision-qwen2-7b-ov-hf",
        config={
            "image_token_index": 151646,
            "video_token_index": 151647,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "image_grid_pinpoints": _grid(384),
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 26,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": 152128,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "use_sliding_window": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "tie_word_embeddings": False,
            },
        },
        tiny={
            "image_grid_pinpoints": _grid(28),
            "vision_config": {
                "hidden_size": 32,
                "image_size": 28,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
            },
            "text_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "initializer_range": 0.1,
            },
        },
        processor={
            "num_image_tokens": 729,
            "vision_feature_select_strategy": "full",
            "image_processor": {
                "size": {"height": 384, "width": 384},
                "image_grid_pinpoints": _grid(384),
                "resample": 3,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "do_pad": True,
            },
        },
        tiny_processor={
            "num_image_tokens": 4,
            "image_processor": {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": _grid(28)},
        },
        special_tokens={**QWEN_SPECIAL_TOKENS, "video": "<video>"},
        modules=LLAVA_MODULES,
        parameters=8_030_807_584,
        chat=CHATML,
        never_generated=("image", "video"),
    )
)
