"""mini-llava: a real LLaVA (SigLIP, Qwen2, chat turns) of 1.1 million parameters, pre-trained here."""

from __future__ import annotations

from pipeline.backbones import register
from pipeline.backbones.base import CHATML, Backbone
from pipeline.backbones.families.llava import LlavaFamily
from pipeline.backbones.llava_interleave_7b import LLAVA_MODULES, QWEN_SPECIAL_TOKENS
from pipeline.backbones.mini_idefics2 import MINI_TEXT, MINI_VISION

BACKBONE = register(
    Backbone(
        name="mini-llava",
        stands_for="llava-interleave-7b",
        family=LlavaFamily(),
        hub_id=None,
        config={
            "image_token_index": 3,
            "image_seq_length": 4,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": False,
            "vision_config": {**MINI_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            "text_config": {
                **MINI_TEXT,
                "model_type": "qwen2",
                "vocab_size": 320,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": 2,
            },
        },
        tiny={},
        processor={
            "patch_size": 16,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
            "image_processor": {
                "size": {"height": 32, "width": 32},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
        },
        tiny_processor={},
        special_tokens=QWEN_SPECIAL_TOKENS,
        modules=LLAVA_MODULES,
        parameters=1_099_904,
        chat=CHATML,
    )
)
