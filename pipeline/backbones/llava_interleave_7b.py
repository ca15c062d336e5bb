"""llava-hf/llava-interleave-qwen-7b-hf: SigLIP with 26 layers, Qwen1.5-7B, ChatML turns.

Traps: `vision_feature_select_strategy` is `full` (the tower has no class token); with `default` the processor writes
728 image tokens for 729 features. The class default of RoPE's theta is not this checkpoint's.
"""

from __future__ import annotations

from pipeline.backbones import register
from pipeline.backbones.base import CHATML, Backbone, Modules, RoleLines
from pipeline.backbones.families.llava import LlavaFamily

LLAVA_MODULES = Modules(
    vision="model.vision_tower",
    connector=("model.multi_modal_projector",),
    decoder_layers="model.language_model.layers",
)
QWEN_SPECIAL_TOKENS = {
    "pad": "<|endoftext|>",
    "turn": "<|im_start|>",
    "eos": "<|im_end|>",
    "image": "<image>",
}

# MimIC's code ends an open query one line break earlier; there the model would have to write the second one first.
PUBLISHED_ROLES = RoleLines(
    instruction="<|im_start|>instruction\n{text}<|im_end|>\n",
    image="<|im_start|>image\n{image}<|im_end|>\n",
    question="<|im_start|>question\n\n{text}<|im_end|>\n",
    cue="<|im_start|>{small_role}\n\n",
    answer="{answer}<|im_end|>",
    after="\n",
    stop=("<|im_end|>",),
)

BACKBONE = register(
    Backbone(
        name="llava-interleave-7b",
        family=LlavaFamily(),
        hub_id="llava-hf/llava-interleave-qwen-7b-hf",
        config={
            "image_token_index": 151646,
            "image_seq_length": 729,  # from memory; nothing here reads it
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,  # from memory; tied, the count would not be the published one
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
                "vocab_size": 152000,
                "hidden_size": 4096,
                "intermediate_size": 11008,  # from memory; it gives the published 8.141 B
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "use_sliding_window": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "bos_token_id": 151643,  # the ids from memory
                "eos_token_id": 151645,
                "tie_word_embeddings": False,
            },
        },
        tiny={
            "image_seq_length": 16,
            "vision_config": {
                "hidden_size": 32,
                "image_size": 56,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
            },
            "text_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "initializer_range": 0.1,
            },
        },
        processor={
            "patch_size": 14,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
            "image_processor": {
                "size": {"height": 384, "width": 384},
                "resample": 3,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
        },
        tiny_processor={"image_processor": {"size": {"height": 56, "width": 56}}},
        special_tokens=QWEN_SPECIAL_TOKENS,
        modules=LLAVA_MODULES,
        parameters=8_141_100_576,
        chat=CHATML,
        published_roles=PUBLISHED_ROLES,
    )
)
