"""mini-idefics2: a real Idefics2 of 1.4 million parameters, pre-trained here to learn in context.

Its sizes are those of `pipeline.miniature.model`, which makes the checkpoint; a test compares the two.
"""

from __future__ import annotations

from pipeline.backbones import register
from pipeline.backbones.base import Backbone
from pipeline.backbones.families.idefics2 import Idefics2Family
from pipeline.backbones.idefics2_8b_base import IDEFICS2_MODULES, IDEFICS2_SPECIAL_TOKENS

MINI_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
MINI_VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 16,
}

BACKBONE = register(
    Backbone(
        name="mini-idefics2",
        stands_for="idefics2-8b-base",
        family=Idefics2Family(),
        hub_id=None,
        config={
            "image_token_id": 5,
            "tie_word_embeddings": False,
            "vision_config": MINI_VISION,
            "perceiver_config": {
                "hidden_size": 128,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 32,
                "num_key_value_heads": 2,
            },
            "text_config": {
                **MINI_TEXT,
                "model_type": "mistral",
                "vocab_size": 322,
                "pad_token_id": 3,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        },
        tiny={},
        processor={
            "image_seq_len": 4,
            "image_processor": {
                "size": {"shortest_edge": 32, "longest_edge": 32},
                "do_image_splitting": False,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
        },
        tiny_processor={},
        special_tokens={**IDEFICS2_SPECIAL_TOKENS, "pad": "<pad>"},
        modules=IDEFICS2_MODULES,
        parameters=1_419_648,
        never_generated=("fake_image", "image"),
    )
)
