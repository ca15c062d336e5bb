"""Trainable parameters on the real configurations, counted on the meta device: the papers' numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from pipeline import adapters
from pipeline.backbones.decoder import decoder_of

VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14}


def idefics2_8b() -> Any:
    return tf.Idefics2ForConditionalGeneration(
        tf.Idefics2Config(
            image_token_id=32001,
            vision_config={**VISION, "image_size": 980, "num_hidden_layers": 27},
            perceiver_config={
                "hidden_size": 4096,
                "resampler_n_latents": 64,
                "resampler_depth": 3,
                "resampler_n_heads": 16,
                "resampler_head_dim": 96,
                "num_key_value_heads": 4,
            },
            text_config=tf.MistralConfig(vocab_size=32002, pad_token_id=0),
        )
    )


def llava_interleave_7b() -> Any:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            image_token_index=151646,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_config=tf.SiglipVisionConfig(**VISION, image_size=384, num_hidden_layers=26, vision_use_head=False),
            text_config=tf.Qwen2Config(vocab_size=152000, intermediate_size=11008),
        )
    )


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    with torch.device("meta"):
        return {"idefics2": idefics2_8b(), "llava": llava_interleave_7b()}


@pytest.mark.parametrize(
    ("backbone", "method", "options", "count"),
    [
        ("idefics2", "hificl", {}, 2_228_224),
        ("llava", "hificl", {}, 2_228_224),
        ("idefics2", "hificl", {"num_virtual_tokens": 16, "rank": 4}, 32 * 32 * 2 * 4 * (16 + 128)),
        ("idefics2", "hificl", {"lowrank_k": False, "lowrank_v": False}, 32 * 32 * 2 * 8 * 128),
        ("idefics2", "mimic", {}, 263_168),
        ("llava", "mimic", {"shift": "linear"}, 32 * 32 * (128**2 + 2 * 128 + 1)),
        ("idefics2", "live", {}, 131_104),
        ("llava", "live", {}, 131_104),
        ("idefics2", "lora", {}, 17_588_224),
        ("llava", "lora", {}, 19_652_608),
        ("idefics2", "lora", {"rank": 8}, 8_794_112),
        ("llava", "lora", {"rank": 8}, 9_826_304),
        ("idefics2", "lora", {"scope": "decoder"}, 13_631_488),
        ("llava", "lora", {"scope": "decoder"}, 16_777_216),
        ("idefics2", "lora-mini", {}, 32 * (4096 + 4096)),
        ("idefics2", "mimic+lora", {}, 263_168 + 17_588_224),
        ("idefics2", "prefix", {}, 2 * 32 * 8 * 8 * 128),
        ("llava", "prefix", {"num_virtual_tokens": 4}, 2 * 32 * 32 * 4 * 128),
        ("idefics2", "prompt", {"num_virtual_tokens": 20}, 20 * 4096),
        ("idefics2", "bottleneck", {"width": 8}, 2 * 32 * (2 * 4096 * 8 + 8 + 4096)),
        ("llava", "bottleneck", {"places": ["mlp"]}, 32 * (2 * 4096 * 16 + 16 + 4096)),
        ("idefics2", "m2iv", {}, 2 * 32 * 4097),
        ("idefics2", "ct-kv", {"num_virtual_tokens": 600}, 2 * 32 * 8 * 600 * 128),
        ("llava", "i2cl", {}, 4 * 32),
        ("llava", "connector", {}, 4096 * (1152 + 1) + 4096 * (4096 + 1)),
        ("llava", "moe-hificl", {"experts": 3}, 3 * 32 * 32 * (2 * 8 * (8 + 128) + 128)),
        ("idefics2", "peft", {"tuner": "ia3"}, 32 * (4096 + 2 * 1024 + 4096)),
    ],
)
def test_trainable_parameters(
    real: dict[str, Any], backbone: str, method: str, options: dict[str, Any], count: int
) -> None:
    adapter = adapters.create(method, real[backbone], **options)
    assert adapter.num_trainable() == count
    assert all(p.is_meta for p in adapter.parameters())


def test_sizes_are_read_off_the_modules(real: dict[str, Any], tiny: Any) -> None:
    found = {name: decoder_of(model) for name, model in real.items()}
    sizes = {n: (s.num_layers, s.num_heads, s.num_kv_heads, s.head_dim, s.hidden_size) for n, s in found.items()}
    assert sizes == {"idefics2": (32, 32, 8, 128, 4096), "llava": (32, 32, 32, 128, 4096)}
    idefics = tiny("idefics")
    spec = decoder_of(idefics)
    assert spec.layers == list(idefics.model.layers) and spec.text_config is idefics.config
    assert all(not module.is_cross_attention for module in spec.attentions)
