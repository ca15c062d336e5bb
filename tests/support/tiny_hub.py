"""Folders in the hub's layout with tiny random weights: a class of transformers, its processor, a chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.backbones.load import tiny_lines

# How published templates write turns and images; each is the pattern of several models.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n<think>\n{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n"
    "{% endif %}"
    "{% endif %}",
)
LLAVA = (
    "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'image' %}IMAGE\n{% endif %}"
    "{% endfor %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %} [/INST]{% else %}"
    " {{ m.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} {% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {% for c in m.content %}{% if c.type == 'image' %}IMAGE"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
TURNS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>", "[INST]", "[/INST]")
PLAIN = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*PLAIN.values(), *TURNS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([line + "\n" for line in tiny_lines()], trainer)
    return tokenizer.to_str()


def tokenizer_with(tokens: Mapping[str, str], more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a small byte-level tokenizer with special tokens by attribute (`image_token`), and more of them."""
    out = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), **PLAIN, extra_special_tokens=dict(tokens), padding_side="left"
    )
    out.add_tokens(list(more), special_tokens=True)
    return out


TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
}
PIXTRAL = {**TOWER, "model_type": "pixtral", "head_dim": 16, "image_size": 56}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
QWEN = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}
QWEN_IMAGES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
IMAGE, VIDEO = {"image_token": "<image>"}, {"image_token": "<image>", "video_token": "<video>"}
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Tiny:
    """How one class is made small.

    Attributes:
        config: of the whole model, given the tokenizer.
        processor: the processor, given the tokenizer and the template; None: a text decoder.
        tokens: special tokens by attribute of the tokenizer.
        more: special tokens without one.
        template: with IMAGE where an image stands; None: a base model.
        image: what the template writes for an image.
    """

    config: Callable[[Any], dict[str, Any]]
    processor: Callable[[Any, str | None], Any] | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    template: str | None = CHATML
    image: str = "<image>"


def _make(name: str, *args: Any, **settings: Any) -> Any:
    return getattr(transformers, name)(*args, **settings)


def _ids(t: Any, text: str) -> int:
    return t.convert_tokens_to_ids(text)


def _text(kind: str, t: Any, **changes: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": kind, "vocab_size": len(t), **changes}


def _pixtral(name: str, tokenizer: Any, template: str | None) -> Any:
    images = _make("PixtralImageProcessorPil", patch_size=28, size={"longest_edge": 56})
    return _make(
        name, image_processor=images, tokenizer=tokenizer, patch_size=14, spatial_merge_size=2, chat_template=template
    )


def _square(name: str, side: int = 28, **more: Any) -> Any:
    return _make(name, size={"height": side, "width": side}, **more)


def _llava(kind: str, **config: Any) -> Tiny:
    tiled = "next" in kind
    images = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if tiled:
        images["image_grid_pinpoints"] = config["image_grid_pinpoints"] = [[28, 56], [56, 28], [56, 56]]  # type: ignore[assignment]
    name = "LlavaNextImageProcessorPil" if tiled else "CLIPImageProcessorPil"
    videos = {"video_processor": _make("LlavaNextVideoVideoProcessor")} if "video" in kind else {}
    cls = {"llava_next": "LlavaNextProcessor", "llava_next_video": "LlavaNextVideoProcessor"}.get(
        kind, "LlavaProcessor"
    )
    return Tiny(
        lambda t: {
            "text_config": _text("llama", t),
            "vision_config": CLIP,
            "image_token_index": t.image_token_id,
            "image_token_id": t.image_token_id,
            **({"video_token_index": t.video_token_id} if videos else {}),
            **config,
        },
        lambda t, c: _make(
            cls,
            image_processor=_make(name, **images),
            tokenizer=t,
            patch_size=14,
            chat_template=c,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **videos,
        ),
        VIDEO if videos else IMAGE,
        template=LLAVA,
    )


def _qwen(
    kind: str,
    cls: str,
    text: str,
    video: str,
    template: str = SYSTEM,
    vision: Any = (),
    tokens: Any = QWEN_TOKENS,
    image: str = QWEN_BLOCK,
    ids: Any = (),
    images: str = "Qwen2VLImageProcessorPil",
    **changes: Any,
) -> Tiny:
    def config(t: Any) -> dict[str, Any]:
        numbers = {f"{name}_id": _ids(t, value) for name, value in tokens.items()}
        return {
            "text_config": _text(text, t, **{"rope_parameters": MROPE, **changes}),
            "vision_config": {**QWEN, **dict(vision)},
            **numbers,
            **{name: _ids(t, value) for name, value in dict(ids).items()},
        }

    return Tiny(
        config,
        lambda t, c: _make(
            cls,
            image_processor=_make(images, **QWEN_IMAGES),
            tokenizer=t,
            video_processor=_make(video),
            chat_template=c,
        ),
        tokens,
        more=tuple(dict(ids).values()),
        template=template,
        image=image,
    )


def _text_only(kind: str, template: str | None = SYSTEM, **changes: Any) -> Tiny:
    return Tiny(lambda t: {**_text(kind, t), **changes}, template=template)


MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 4,
}
DEEP = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64}
GLM_VIDEO = {"image_token": "<|image|>", "video_token": "<|video|>"}
GLM_IDS = {
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
GLM_BLOCK = "<|begin_of_image|><|image|><|end_of_image|>"
GLM_VISION = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 32}

HUB: dict[str, Tiny] = {
    "llava": _llava("llava", image_seq_length=4),
    "vipllava": _llava("vipllava", vision_feature_layers=[-2, -1], image_seq_length=4),
    "llava_next": _llava("llava_next"),
    "llava_next_video": _llava("llava_next_video"),
    "idefics3": Tiny(
        lambda t: {
            "text_config": _text("llama", t),
            "vision_config": {**TOWER, "model_type": "idefics3_vision", "image_size": 56},
            "scale_factor": 2,
            "image_token_id": _ids(t, "<image>"),
        },
        lambda t, c: _make(
            "Idefics3Processor",
            _make("Idefics3ImageProcessorPil", size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
            t,
            image_seq_len=4,
            chat_template=c,
        ),
        more=(
            "<fake_token_around_image>",
            "<image>",
            "<global-img>",
            *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
        ),
        template=IDEFICS,
    ),
    "smolvlm": Tiny(
        lambda t: {
            "text_config": _text("llama", t),
            "vision_config": {**TOWER, "model_type": "smolvlm_vision", "image_size": 56},
            "scale_factor": 2,
            "image_token_id": _ids(t, "<image>"),
        },
        lambda t, c: _make(
            "SmolVLMProcessor",
            _make("SmolVLMImageProcessorPil", size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
            t,
            _make("SmolVLMVideoProcessor"),
            image_seq_len=4,
            chat_template=c,
        ),
        {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
        more=tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
        template=IDEFICS,
    ),
    "qwen2_vl": _qwen(
        "qwen2_vl",
        "Qwen2VLProcessor",
        "qwen2_vl_text",
        "Qwen2VLVideoProcessor",
        vision={"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": _qwen(
        "qwen2_5_vl",
        "Qwen2_5_VLProcessor",
        "qwen2_5_vl_text",
        "Qwen2VLVideoProcessor",
        vision={
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": _qwen(
        "qwen3_vl",
        "Qwen3VLProcessor",
        "qwen3_vl_text",
        "Qwen3VLVideoProcessor",
        vision={**DEEP, "deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_vl_moe": _qwen(
        "qwen3_vl_moe",
        "Qwen3VLProcessor",
        "qwen3_vl_moe_text",
        "Qwen3VLVideoProcessor",
        vision={**DEEP, "deepstack_visual_indexes": [0, 1]},
        **MOE,
    ),
    "qwen3_5": _qwen(
        "qwen3_5", "Qwen3VLProcessor", "qwen3_5_text", "Qwen3VLVideoProcessor", THINKING, vision=DEEP, **LINEAR
    ),
    "qwen3_5_moe": _qwen(
        "qwen3_5_moe",
        "Qwen3VLProcessor",
        "qwen3_5_moe_text",
        "Qwen3VLVideoProcessor",
        THINKING,
        vision=DEEP,
        shared_expert_intermediate_size=32,
        **MOE,
        **LINEAR,
    ),
    "glm4v": _qwen(
        "glm4v",
        "Glm4vProcessor",
        "glm4v_text",
        "Glm4vVideoProcessor",
        vision=GLM_VISION,
        tokens=GLM_VIDEO,
        image=GLM_BLOCK,
        ids=GLM_IDS,
        images="Glm4vImageProcessorPil",
    ),
    "glm46v": _qwen(
        "glm46v",
        "Glm46VProcessor",
        "glm4v_text",
        "Glm46VVideoProcessor",
        THINKING,
        vision=GLM_VISION,
        tokens=GLM_VIDEO,
        image=GLM_BLOCK,
        ids=GLM_IDS,
        images="Glm46VImageProcessorPil",
    ),
    "glm4v_moe": _qwen(
        "glm4v_moe",
        "Glm4vProcessor",
        "glm4v_moe_text",
        "Glm4vVideoProcessor",
        vision=GLM_VISION,
        tokens=GLM_VIDEO,
        image=GLM_BLOCK,
        ids=GLM_IDS,
        images="Glm4vImageProcessorPil",
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        rope_parameters={**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
    ),
    "video_llama_3": Tiny(
        lambda t: {
            "text_config": _text("qwen2", t),
            "vision_config": {**TOWER, "model_type": "video_llama_3_vision", "patch_size": 4},
            "image_token_id": t.image_token_id,
            "video_token_id": t.video_token_id,
        },
        lambda t, c: _make(
            "VideoLlama3Processor",
            image_processor=_make(
                "VideoLlama3ImageProcessorPil",
                patch_size=4,
                merge_size=1,
                size={"shortest_edge": 64, "longest_edge": 256},
            ),
            tokenizer=t,
            video_processor=_make("VideoLlama3VideoProcessor"),
            chat_template=c,
        ),
        VIDEO,
    ),
    "internvl": Tiny(
        lambda t: {
            "text_config": _text("qwen2", t),
            "vision_config": {**TOWER, "image_size": [28, 28], "patch_size": [7, 7], "model_type": "internvl_vision"},
            "image_token_id": t.context_image_token_id,
            "image_seq_length": 4,
        },
        lambda t, c: _make(
            "InternVLProcessor",
            image_processor=_square("GotOcr2ImageProcessorPil", crop_to_patches=True, max_patches=3),
            tokenizer=t,
            video_processor=_make("InternVLVideoProcessor"),
            image_seq_length=4,
            chat_template=c,
        ),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        template=SYSTEM,
        image="<IMG_CONTEXT>",
    ),
    "gemma3": Tiny(
        lambda t: {
            "text_config": _text(
                "gemma3_text",
                t,
                sliding_window=16,
                query_pre_attn_scalar=16,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "vision_config": {**SIGLIP, "patch_size": 7},
            "mm_tokens_per_image": 4,
            "boi_token_index": t.boi_token_id,
            "eoi_token_index": t.eoi_token_id,
            "image_token_index": t.image_token_id,
        },
        lambda t, c: _make(
            "Gemma3Processor", _square("Gemma3ImageProcessorPil"), t, image_seq_length=4, chat_template=c
        ),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        template=GEMMA,
        image="<start_of_image>",
    ),
    "mistral3": Tiny(
        lambda t: {
            "text_config": _text("mistral", t),
            "vision_config": PIXTRAL,
            "image_token_index": _ids(t, "[IMG]"),
            "spatial_merge_size": 2,
        },
        lambda t, c: _pixtral("PixtralProcessor", t, c),
        more=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        template=MISTRAL,
        image="[IMG]",
    ),
    "ovis2": Tiny(
        lambda t: {
            "text_config": _text("qwen2", t),
            "vision_config": {**TOWER, "vocab_size": 24, "hidden_stride": 1, "model_type": "ovis2_vision"},
            "image_token_id": _ids(t, "<IMG_ATOM>"),
            "vocab_size": len(t),
            "hidden_size": 64,
            "visual_indicator_token_ids": [_ids(t, f"<IMG_{name}>") for name in ("START", "GRID", "COL", "ROW", "END")],
        },
        lambda t, c: _make(
            "Ovis2Processor",
            image_processor=_square("Ovis2ImageProcessorPil", crop_to_patches=True, max_patches=3),
            tokenizer=t,
            image_seq_length=4,
            chat_template=c,
        ),
        more=("<image>", *(f"<IMG_{name}>" for name in ("ATOM", "START", "GRID", "COL", "ROW", "END"))),
    ),
    "cohere2_vision": Tiny(
        lambda t: {
            "text_config": _text("cohere2", t, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
            "vision_config": {**SIGLIP, "patch_size": 7},
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
            "image_token_id": t.image_token_id,
        },
        lambda t, c: _make(
            "Cohere2VisionProcessor",
            image_processor=_square("Cohere2VisionImageProcessor", max_patches=3, patch_size=2),
            tokenizer=t,
            chat_template=c,
        ),
        {
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        image="<|IMG_PATCH|>",
    ),
    "aya_vision": Tiny(
        lambda t: {
            "text_config": _text("cohere2", t, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
            "vision_config": {**SIGLIP, "patch_size": 7},
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
            "image_token_index": _ids(t, "<|IMG_PATCH|>"),
        },
        lambda t, c: _make(
            "AyaVisionProcessor",
            image_processor=_square("GotOcr2ImageProcessorPil", crop_to_patches=True, max_patches=3),
            tokenizer=t,
            patch_size=7,
            img_size=28,
            downsample_factor=2,
            chat_template=c,
        ),
        more=("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"),
    ),
    "aria": Tiny(
        lambda t: {
            "text_config": _text("aria_text", t, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            "vision_config": {**TOWER, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 70},
            "projector_patch_to_query_dict": {196: 4},
            "image_token_index": t.image_token_id,
        },
        lambda t, c: _make(
            "AriaProcessor",
            image_processor=_make("AriaImageProcessorPil"),
            tokenizer=t,
            chat_template=c,
            size_conversion={980: 4},
        ),
        IMAGE,
    ),
    "deepseek_vl": Tiny(
        lambda t: {"text_config": _text("llama", t), "vision_config": SIGLIP, "image_token_id": t.image_token_id},
        lambda t, c: _make(
            "DeepseekVLProcessor",
            _square("DeepseekVLImageProcessorPil", min_size=14),
            t,
            chat_template=c,
            num_image_tokens=4,
        ),
        IMAGE,
        template=LLAVA.replace("IMAGE\n", "IMAGE"),
    ),
    "janus": Tiny(
        lambda t: {
            "text_config": _text("llama", t),
            "vision_config": {
                **TOWER,
                "model_type": "janus_vision_model",
                "projection_dim": 64,
                "num_image_tokens": 4,
                "mlp_ratio": 2.0,
            },
            "vq_config": {
                "embed_dim": 4,
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 2,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
            },
            "image_token_id": t.image_token_id,
        },
        lambda t, c: _make(
            "JanusProcessor", _square("JanusImageProcessorPil", min_size=14), t, chat_template=c, num_image_tokens=4
        ),
        {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        image="<image_placeholder>",
        template=LLAVA,
    ),
    "lfm2_vl": Tiny(
        lambda t: {
            "text_config": _text(
                "lfm2",
                t,
                num_hidden_layers=4,
                layer_types=["conv", "full_attention", "conv", "full_attention"],
                block_auto_adjust_ff_dim=False,
            ),
            "vision_config": {
                "model_type": "siglip2_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 4,
                "num_patches": 64,
                "vision_use_head": False,
            },
            "image_token_id": t.image_token_id,
            "downsample_factor": 2,
            "projector_hidden_size": 64,
        },
        lambda t, c: _make(
            "Lfm2VlProcessor",
            _make(
                "Lfm2VlImageProcessor",
                encoder_patch_size=4,
                downsample_factor=2,
                tile_size=32,
                min_image_tokens=4,
                max_image_tokens=16,
                max_num_patches=64,
                do_image_splitting=False,
            ),
            t,
            chat_template=c,
        ),
        {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
    ),
    "lighton_ocr": Tiny(
        lambda t: {
            "text_config": _text("qwen3", t),
            "vision_config": PIXTRAL,
            "image_token_id": t.image_token_id,
            "spatial_merge_size": 2,
        },
        lambda t, c: _pixtral("LightOnOcrProcessor", t, c),
        {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"},
        image="<|image_pad|>",
    ),
    "paddleocr_vl": Tiny(
        lambda t: {
            "text_config": _text("paddleocr_vl_text", t, rope_parameters=MROPE),
            "vision_config": {**TOWER, "model_type": "paddleocr_vl_vision", "patch_size": 4, "image_size": 32},
            "image_token_id": t.image_token_id,
            "video_token_id": t.video_token_id,
            "vision_start_token_id": _ids(t, "<|IMAGE_START|>"),
            "vision_end_token_id": _ids(t, "<|IMAGE_END|>"),
        },
        lambda t, c: _make(
            "PaddleOCRVLProcessor",
            image_processor=_make("PaddleOCRVLImageProcessorPil", **QWEN_IMAGES),
            tokenizer=t,
            chat_template=c,
        ),
        {"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|video_pad|>"},
        more=("<|IMAGE_START|>", "<|IMAGE_END|>"),
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
    ),
    "llama4": Tiny(
        lambda t: {
            "text_config": _text(
                "llama4_text",
                t,
                intermediate_size_mlp=48,
                num_local_experts=4,
                num_experts_per_tok=1,
                no_rope_layers=[1, 0],
                moe_layers=[0],
                attention_chunk_size=4096,
                layer_types=["chunked_attention", "full_attention"],
            ),
            "vision_config": {
                **TOWER,
                "model_type": "llama4_vision_model",
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "intermediate_size": 128,
                "patch_size": 7,
            },
            "image_token_index": _ids(t, "<|patch|>"),
            "boi_token_index": 0,
            "eoi_token_index": 0,
        },
        lambda t, c: _make(
            "Llama4Processor",
            image_processor=_square("Llama4ImageProcessor", max_patches=3),
            tokenizer=t,
            patch_size=7,
            pixel_shuffle_ratio=0.5,
            chat_template=c,
        ),
        more=(
            "<|image|>",
            "<|image_start|>",
            "<|image_end|>",
            "<|patch|>",
            "<|tile_x_separator|>",
            "<|tile_y_separator|>",
        ),
        image="<|image|>",
    ),
    "llama": _text_only("llama"),
    "mistral": _text_only("mistral", None, sliding_window=16),
    "qwen2": _text_only("qwen2"),
    "qwen3": _text_only("qwen3", THINKING),
    "smollm3": _text_only("smollm3"),
    "olmo2": _text_only("olmo2"),
    "granite": _text_only("granite", attention_multiplier=0.2, logits_scaling=2.0, residual_multiplier=0.5),
    "gemma3_text": _text_only(
        "gemma3_text",
        None,
        sliding_window=16,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cohere2": _text_only("cohere2", sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    "qwen3_moe": _text_only("qwen3_moe", **MOE),
    "gpt_oss": _text_only("gpt_oss", sliding_window=16, layer_types=["sliding_attention", "full_attention"], **MOE),
    "qwen3_next": _text_only("qwen3_next", shared_expert_intermediate_size=32, **MOE, **LINEAR),
    "lfm2": _text_only(
        "lfm2",
        num_hidden_layers=4,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
}


def make(model_type: str, folder: Path, seed: int = 0) -> Path:
    """Write a folder in the hub's layout."""
    tiny = HUB[model_type]
    tokenizer = tokenizer_with(tiny.tokens, tiny.more)
    template = None if tiny.template is None else tiny.template.replace("IMAGE", tiny.image)
    if tiny.processor is None:
        tokenizer.chat_template = template
        processor = tokenizer
        auto: Any = transformers.AutoModelForCausalLM
    else:
        processor = tiny.processor(tokenizer, template)
        auto = transformers.AutoModelForImageTextToText
    config = CONFIG_MAPPING[model_type](**tiny.config(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
