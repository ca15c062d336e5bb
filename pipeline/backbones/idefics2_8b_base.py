"""HuggingFaceM4/idefics2-8b-base: a base model, prompted with the papers' plain lines.

Traps: the vocabulary has 32,002 rows and no `<end_of_utterance>`, which the processor class adds all the same, past
the embedding: no instruct template here. Mistral's sliding window of 4,096 stays on.
"""

from __future__ import annotations

from pipeline.backbones import register
from pipeline.backbones.base import Backbone, Modules, RoleLines
from pipeline.backbones.families.idefics2 import Idefics2Family

IDEFICS2_MODULES = Modules(
    vision="model.vision_model", connector=("model.connector",), decoder_layers="model.text_model.layers"
)
IDEFICS2_SPECIAL_TOKENS = {
    "unk": "<unk>",
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<unk>",  # id 0; that the pad token's text is <unk> is from memory, the id is not
    "fake_image": "<fake_token_around_image>",
    "image": "<image>",
}

# MimIC's code misspells the instruct model's end marker, which makes it plain text to the tokenizer.
_END = "<end_of_outterance>"
PUBLISHED_ROLES = RoleLines(
    instruction=f"Instruction: {{text}}{_END}\n",
    image=f"Image:{{image}}{_END}\n",
    question=f"Question: {{text}}{_END}\n",
    cue="{role}:",
    answer=f" {{answer}}{_END}\n",
    stop=(_END,),
)

BACKBONE = register(
    Backbone(
        name="idefics2-8b-base",
        family=Idefics2Family(),
        hub_id="HuggingFaceM4/idefics2-8b-base",
        config={
            "image_token_id": 32001,
            "tie_word_embeddings": False,
            "vision_config": {
                "hidden_size": 1152,
                "image_size": 980,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
            },
            "perceiver_config": {
                "hidden_size": 4096,
                "resampler_n_latents": 64,
                "resampler_depth": 3,
                "resampler_n_heads": 16,
                "resampler_head_dim": 96,
                "num_key_value_heads": 4,
                "hidden_act": "silu",
                "rms_norm_eps": 1e-6,
            },
            "text_config": {
                "model_type": "mistral",
                "vocab_size": 32002,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-5,
                "sliding_window": 4096,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "tie_word_embeddings": False,
            },
        },
        tiny={
            "vision_config": {
                "hidden_size": 32,
                "image_size": 56,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
            },
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            "text_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "initializer_range": 0.1,  # random logits that differ enough to compare
            },
        },
        processor={
            "image_seq_len": 64,
            "image_processor": {
                "size": {"shortest_edge": 378, "longest_edge": 980},
                "do_image_splitting": False,
                "resample": 2,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "do_pad": True,
                "do_convert_rgb": True,
            },
        },
        tiny_processor={"image_seq_len": 4, "image_processor": {"size": {"shortest_edge": 28, "longest_edge": 56}}},
        special_tokens=IDEFICS2_SPECIAL_TOKENS,
        modules=IDEFICS2_MODULES,
        parameters=8_402_759_920,
        never_generated=("fake_image", "image"),
        published_roles=PUBLISHED_ROLES,
    )
)
