"""HuggingFaceM4/idefics-9b: MimIC's first backbone, a base model prompted with the papers' plain lines.

Traps: not its class's defaults (`cross_layer_interval` 4, resampler on, `qk_layer_norms`, vision width 1,280, two extra
vocabulary rows); the freeze flags set `requires_grad` at construction; 2,048 positions.
"""

from __future__ import annotations

from pipeline.backbones import register
from pipeline.backbones.base import Backbone, Modules, RoleLines
from pipeline.backbones.families.idefics import IdeficsFamily
from pipeline.backbones.idefics2_8b_base import IDEFICS2_SPECIAL_TOKENS

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

PUBLISHED_ROLES = RoleLines(
    instruction="Instruction: {text}\n",
    image="Image:{image} ",
    question="Question: {text} ",
    cue="{role}:",
    answer=" {answer}\n",
)

BACKBONE = register(
    Backbone(
        name="idefics-9b",
        family=IdeficsFamily(),
        hub_id="HuggingFaceM4/idefics-9b",
        config={
            "vocab_size": 32000,
            "additional_vocab_size": 2,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "cross_layer_interval": 4,
            "qk_layer_norms": True,
            "alpha_initializer": "zeros",
            "alpha_type": "float",
            "alphas_initializer_range": 0.0,
            "use_resampler": True,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "freeze_text_layers": False,  # the three flags from memory; loading freezes everything anyway
            "freeze_vision_layers": False,
            "freeze_lm_head": False,
            "vision_config": {
                "embed_dim": 1280,
                "image_size": 224,
                "intermediate_size": 5120,
                "num_attention_heads": 16,
                "num_hidden_layers": 32,
                "patch_size": 14,
                "hidden_act": "gelu",
            },
            "perceiver_config": {
                "use_resampler": True,
                "resampler_n_latents": 64,
                "resampler_depth": 6,
                "resampler_n_heads": 16,
                "resampler_head_dim": 96,
                "qk_layer_norms_perceiver": True,  # from memory
            },
        },
        tiny={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "cross_layer_interval": 1,
            "initializer_range": 0.1,
            "alpha_initializer": "ones",  # closed gates would hide the images from random weights
            "vision_config": {
                "embed_dim": 32,
                "image_size": 28,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
            },
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
            },
        },
        processor={"image_processor": {"image_size": 224, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}},
        tiny_processor={"image_processor": {"image_size": 28}},
        special_tokens=IDEFICS2_SPECIAL_TOKENS,
        modules=Modules(
            vision="model.vision_model",
            connector=("model.perceiver_resampler", "model.gated_cross_attn_layers"),
            decoder_layers="model.layers",
        ),
        parameters=8_929_679_632,
        never_generated=("fake_image", "image"),
        published_roles=PUBLISHED_ROLES,
    )
)
