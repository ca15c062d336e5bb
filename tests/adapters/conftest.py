"""Tiny random models of every family, and the real configurations on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

IMAGE = 299  # id of the image token in every tiny model
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def mistral(**over: Any) -> Any:
    return tf.MistralForCausalLM(tf.MistralConfig(**{**TEXT, "num_key_value_heads": 2, "sliding_window": None, **over}))


def qwen2(**over: Any) -> Any:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**TEXT, "num_key_value_heads": 4, **over}))


def llama(**over: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "num_key_value_heads": 1, "head_dim": 16, **over}))


def idefics2(**over: Any) -> Any:
    return tf.Idefics2ForConditionalGeneration(
        tf.Idefics2Config(
            vision_config=dict(VISION),
            image_token_id=IMAGE,
            perceiver_config={
                "hidden_size": 32,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            text_config=tf.MistralConfig(**{**TEXT, "num_key_value_heads": 2, "sliding_window": None, **over}),
        )
    )


def llava(**over: Any) -> Any:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.SiglipVisionConfig(**VISION),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            text_config=tf.Qwen2Config(**{**TEXT, "num_key_value_heads": 4, **over}),
        )
    )


def llava_next(**over: Any) -> Any:
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            vision_config=tf.CLIPVisionConfig(**VISION),
            image_token_index=IMAGE,
            text_config=tf.MistralConfig(**{**TEXT, "num_key_value_heads": 2, "sliding_window": None, **over}),
        )
    )


def llava_onevision(**over: Any) -> Any:
    return tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(
            vision_config=tf.SiglipVisionConfig(**VISION),
            image_token_index=IMAGE,
            video_token_index=298,
            text_config=tf.Qwen2Config(**{**TEXT, "num_key_value_heads": 2, **over}),
        )
    )


def qwen3_vl(**over: Any) -> Any:
    return tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 14,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            text_config={
                **TEXT,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
                **over,
            },
            image_token_id=IMAGE,
            video_token_id=298,
            vision_start_token_id=296,
            vision_end_token_id=297,
        )
    )


def idefics(**over: Any) -> Any:
    return tf.IdeficsForVisionText2Text(
        tf.IdeficsConfig(
            **{
                **TEXT,
                "additional_vocab_size": 2,
                "cross_layer_interval": 2,
                "qk_layer_norms": True,
                "use_resampler": True,
                "num_hidden_layers": 4,
                "vision_config": {
                    "embed_dim": 16,
                    "image_size": 28,
                    "intermediate_size": 32,
                    "num_attention_heads": 2,
                    "num_hidden_layers": 1,
                    "patch_size": 14,
                },
                "perceiver_config": {
                    "use_resampler": True,
                    "resampler_n_latents": 4,
                    "resampler_depth": 1,
                    "resampler_n_heads": 2,
                    "resampler_head_dim": 8,
                    "qk_layer_norms_perceiver": True,
                },
                **over,
            }
        )
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (mistral, qwen2, llama, idefics2, llava, llava_next, llava_onevision, qwen3_vl, idefics)
}


def stirred(adapter: nn.Module, seed: int = 3, std: float = 0.3) -> Any:
    """Move every parameter off its initial value, so that zero initialisation hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return adapter


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """Return a factory: `tiny("idefics2", seed=0, dtype=torch.float64, **text_config)`, in eval mode."""

    def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **over: Any) -> Any:
        torch.manual_seed(seed)
        return FAMILIES[family](**over).to(dtype).eval()

    return make


@pytest.fixture
def inputs() -> Callable[..., dict[str, Any]]:
    """Return a factory of a batch for a model: text, and an image a row where idefics2 and llava see one."""

    def make(model: Any, batch: int = 2, length: int = 12, seed: int = 1) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 290, (batch, length), generator=generator)
        out: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kind = model.config.model_type
        if kind in ("idefics2", "llava"):
            ids[:, 1:5] = IMAGE
            shape = (batch, 1, 3, 28, 28) if kind == "idefics2" else (batch, 3, 28, 28)
            out["pixel_values"] = torch.randn(shape, generator=generator).to(model.dtype)
        if kind == "idefics":
            out["pixel_values"] = torch.randn((batch, 1, 3, 28, 28), generator=generator).to(model.dtype)
            out["image_attention_mask"] = torch.ones(batch, length, 1, dtype=torch.long)
        return out

    return make
