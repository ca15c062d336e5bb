"""Qwen/Qwen3-VL-8B-Instruct: a native-size tower, three feature maps added in decoder layers 0 to 2, ChatML turns.

Traps: RoPE's theta is 5e6 and three-dimensional; the image processor is Qwen2-VL's, whose defaults are patch size 14
and CLIP's mean; the processor class needs torchvision for its video part; the published generation settings sample.
"""

from __future__ import annotations

from pipeline.backbones import register
from pipeline.backbones.base import CHATML, Backbone, Modules
from pipeline.backbones.families.qwen3_vl import Qwen3VLFamily

BACKBONE = register(
    Backbone(
        name="qwen3-vl-8b",
        family=Qwen3VLFamily(),
        hub_id="Qwen/Qwen3-VL-8B-Instruct",
        config={
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "tie_word_embeddings": False,
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "hidden_act": "gelu_pytorch_tanh",
                "intermediate_size": 4304,
                "num_heads": 16,
                "in_channels": 3,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 4096,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
                "initializer_range": 0.02,
            },
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 12288,  # from memory; it gives the published 8.77 B
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "hidden_act": "silu",
                "max_position_embeddings": 262144,
                "rms_norm_eps": 1e-6,
                "attention_bias": False,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5000000.0,
                    "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20],
                },
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "tie_word_embeddings": False,  # from memory
            },
        },
        tiny={
            "vision_config": {
                "depth": 4,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1, 2],
            },
            "text_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "initializer_range": 0.1,
                "rope_parameters": {"mrope_section": [4, 2, 2]},
            },
        },
        processor={
            "image_processor": {
                "size": {"shortest_edge": 65536, "longest_edge": 16777216},
                "patch_size": 16,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
        },
        tiny_processor={"image_processor": {"size": {"shortest_edge": 1024, "longest_edge": 8192}}},
        special_tokens={
            "pad": "<|endoftext|>",
            "turn": "<|im_start|>",
            "eos": "<|im_end|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
        },
        modules=Modules(
            vision="model.visual",
            connector=("model.visual.merger", "model.visual.deepstack_merger_list"),
            decoder_layers="model.language_model.layers",
        ),
        parameters=8_767_123_696,
        chat=CHATML,
        never_generated=("image", "video", "vision_start", "vision_end"),
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
    )
)
