r"""llava-hf/llava-v1.6-mistral-7b-hf: CLIP with tiles, Mistral-7B-Instruct, `[INST]` turns.

Traps: the published template ends an answer with the literal text `<\s>`; ours ends it with the real end token, so
that it is learnt. Mistral's sliding window is off and must be told so.
"""

from __future__ import annotations

from pipeline.backbones import register
from pipeline.backbones.base import Backbone, ChatMarkers
from pipeline.backbones.families.llava_tiles import LlavaNextFamily
from pipeline.backbones.idefics_9b import CLIP_MEAN, CLIP_STD
from pipeline.backbones.llava_interleave_7b import LLAVA_MODULES

BACKBONE = register(
    Backbone(
        name="llava-v1.6-mistral-7b",
        family=LlavaNextFamily(),
        hub_id="llava-hf/llava-v1.6-mistral-7b-hf",
        config={
            "image_token_index": 32000,
            "image_seq_length": 576,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
            "text_config": {
                "model_type": "mistral",
                "vocab_size": 32064,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-5,  # from memory
                "sliding_window": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "bos_token_id": 1,
                "eos_token_id": 2,
                "tie_word_embeddings": False,
            },
        },
        tiny={
            "image_seq_length": 4,
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
            "vision_config": {
                "hidden_size": 32,
                "image_size": 28,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
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
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_processor": {
                "size": {"shortest_edge": 336},
                "crop_size": {"height": 336, "width": 336},
                "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
                "resample": 3,
                "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD,
                "do_pad": True,
            },
        },
        tiny_processor={
            "image_processor": {
                "size": {"shortest_edge": 28},
                "crop_size": {"height": 28, "width": 28},
                "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
            }
        },
        special_tokens={"unk": "<unk>", "bos": "<s>", "eos": "</s>", "image": "<image>", "pad": "<pad>"},
        modules=LLAVA_MODULES,
        parameters=7_566_747_648,
        chat=ChatMarkers(user_open="[INST] ", user_close=" [/INST]", assistant_open=" ", terminator="</s>", after=""),
    )
)
