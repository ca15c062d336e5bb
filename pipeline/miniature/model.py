"""The miniature's architectures, tokenizers and processors: real transformers classes, far smaller than the papers'.

Tokenizers are of words: one plain word, one token; the newline and "Answer:" are tokens too. The processors leave
32 x 32 pixels as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessorPil,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipeline.core.errors import InputError, nearest
from pipeline.miniature.lexicon import TOPICS, style_words, value_words
from pipeline.miniature.render import IMAGE_SIZE

# Four large patches learn to see faster than sixteen small ones here, and LLaVA, which has no resampler,
# spends one token on each.
PATCH_SIZE = 16
MAX_POSITIONS = 2048
# Wider than the usual 0.02: at this width the attention's logits would start too flat to learn from.
INITIALIZER_RANGE, EMBEDDING_STD = 0.06, 0.3

# A newline; a word, with the colon of a role; any other mark by itself. Spaces separate and are dropped.
_WORD = r"\n|\w+:?|[^\w\s]"
_PROMPTS = (
    "Instruction: provide an answer to the question . Use image",
    "a short caption of input",
    "Image: Question: Answer: Caption: Which ?",
)
_CHAT_ROLES = ("system", "user", "assistant")

IDEFICS2_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<fake_token_around_image>", "<image>")
LLAVA_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def plain_words() -> list[str]:
    """Return all words besides the special tokens, each once, in a fixed order."""
    words = [
        "\n",
        *" ".join(_PROMPTS).split(),
        *_CHAT_ROLES,
        *(topic.name for topic in TOPICS),
        *style_words(),
        *value_words(),
    ]
    return list(dict.fromkeys(words))


def idefics2_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `mini-idefics2`: Idefics2's special tokens, `<s>` put before every text."""
    tokenizer = _word_level(IDEFICS2_SPECIAL, unknown="<unk>")
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=["<fake_token_around_image>", "<image>"],
        clean_up_tokenization_spaces=False,
        **roles,
    )


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `mini-llava`: Qwen2's chat markers, nothing put before a text."""
    roles = {"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(LLAVA_SPECIAL, unknown="<|endoftext|>"),
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"],
        clean_up_tokenization_spaces=False,
        **roles,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of `token`."""
    return int(tokenizer.get_vocab()[token])


def _word_level(special: tuple[str, ...], unknown: str) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate([*special, *plain_words()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = Split(Regex(_WORD), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


@dataclass(frozen=True)
class Size:
    """Sizes of decoder and vision tower; the defaults are the committed checkpoints'."""

    width: int = 128
    mlp_width: int = 320
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vision_width: int = 96
    vision_layers: int = 3
    vision_heads: int = 3

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the weights, falling with the square root of the width."""
        return INITIALIZER_RANGE * (Size.width / self.width) ** 0.5


SMALL = Size()
LARGE = Size(
    width=384, mlp_width=1024, layers=8, heads=12, kv_heads=4, vision_width=192, vision_layers=4, vision_heads=6
)
SIZES = {"small": SMALL, "large": LARGE}


@dataclass(frozen=True)
class Miniature:
    """One tiny backbone.

    Attributes:
        name: as in params.yaml.
        make_tokenizer: its tokenizer.
        make_config: its configuration, given the tokenizer and the sizes.
        model_class: its transformers class.
        decoder: dotted name of the language model inside the model.
        visual_tokens: tokens an image takes in the decoder.
        image_text: what the processor turns `<image>` into.
        image_axis: pixel values have an axis for the images of a row.
        chat: demonstrations are turns of a chat.
    """

    name: str
    make_tokenizer: Callable[[], PreTrainedTokenizerFast]
    make_config: Callable[[PreTrainedTokenizerFast, Size], Any]
    model_class: type[PreTrainedModel]
    decoder: str
    visual_tokens: int
    image_text: str
    image_axis: bool
    chat: bool

    def build(self, seed: int, size: Size = SMALL) -> PreTrainedModel:
        """Return the model of a size with random weights (fp32), fixed by `seed`."""
        tokenizer = self.make_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model_class(self.make_config(tokenizer, size))
            nn.init.normal_(cast(nn.Embedding, model.get_input_embeddings()).weight, std=EMBEDDING_STD)
        return model

    def is_visual(self, parameter: str) -> bool:
        """Say whether the parameter of that name belongs to the vision tower or the connector."""
        return not parameter.startswith((self.decoder, "lm_head"))


def _text_config(tokenizer: PreTrainedTokenizerFast, model_type: str, size: Size) -> dict[str, object]:
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.width // size.heads,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": size.initializer_range,
        "sliding_window": None,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }


def _vision_config(size: Size) -> dict[str, object]:
    return {
        "hidden_size": size.vision_width,
        "intermediate_size": 2 * size.vision_width,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }


def _idefics2_config(tokenizer: PreTrainedTokenizerFast, size: Size) -> Idefics2Config:
    return Idefics2Config(
        vision_config=_vision_config(size),
        perceiver_config={
            "resampler_n_latents": IDEFICS2.visual_tokens,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "num_key_value_heads": 2,
            "resampler_head_dim": 32,
            "hidden_size": size.width,
        },
        text_config=_text_config(tokenizer, "mistral", size),
        image_token_id=token_id(tokenizer, "<image>"),
        tie_word_embeddings=False,
    )


def _llava_config(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlavaConfig:
    return LlavaConfig(
        vision_config={**_vision_config(size), "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=_text_config(tokenizer, "qwen2", size),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=LLAVA.visual_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


IDEFICS2 = Miniature(
    name="mini-idefics2",
    make_tokenizer=idefics2_tokenizer,
    make_config=_idefics2_config,
    model_class=Idefics2ForConditionalGeneration,
    decoder="model.text_model",
    visual_tokens=4,
    image_text="<fake_token_around_image>" + "<image>" * 4 + "<fake_token_around_image>",
    image_axis=True,
    chat=False,
)
LLAVA = Miniature(
    name="mini-llava",
    make_tokenizer=llava_tokenizer,
    make_config=_llava_config,
    model_class=LlavaForConditionalGeneration,
    decoder="model.language_model",
    visual_tokens=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    image_text="<image>" * (IMAGE_SIZE // PATCH_SIZE) ** 2,
    image_axis=False,
    chat=True,
)
MINIATURES = {spec.name: spec for spec in (IDEFICS2, LLAVA)}


def miniature(name: str) -> Miniature:
    """Return the miniature called `name`.

    Raises:
        InputError: there is none; the message lists them.
    """
    if name not in MINIATURES:
        raise InputError(f"unknown miniature '{name}'", way_out=nearest(name, MINIATURES))
    return MINIATURES[name]


def normalise(images: Tensor) -> Tensor:
    """Return pixels as the image processor would: uint8 [N, 32, 32, 3] -> float [N, 3, 32, 32] in [-1, 1]."""
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def encode_images(spec: Miniature, model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode pixels [N, 3, 32, 32] through the model's own method.

    Returns:
        visual tokens [N, visual_tokens, d], and the vision tower's own output [N, patches, vision width].
    """
    if spec.image_axis:
        pixels = pixels[:, None]  # one image a row
    encoded = cast(Any, model).get_image_features(pixels, return_dict=True)
    tokens = torch.cat(list(encoded.pooler_output)).view(len(pixels), spec.visual_tokens, -1)
    return tokens, encoded.last_hidden_state


def decode_hidden(model: PreTrainedModel, input_ids: Tensor, visual: Tensor) -> Tensor:
    """Return the last hidden states [B, T, d], visual tokens given instead of pixels.

    Args:
        model: either miniature.
        input_ids: [B, T], padded on the right (causal attention never sees the padding).
        visual: [images of the whole batch in order, visual_tokens, d].
    """
    encoded = BaseModelOutputWithPooling(pooler_output=cast(Any, list(visual.to(torch.float32))))
    return model.model(input_ids=input_ids, mm_encoder_outputs={"image": encoded}, use_cache=False).last_hidden_state


_HALF = [0.5, 0.5, 0.5]


def idefics2_processor(spec: Miniature) -> ProcessorMixin:
    """Return the processor of `mini-idefics2`; it adds `<end_of_utterance>` past the vocabulary, as the real one."""
    images = Idefics2ImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": IMAGE_SIZE, "longest_edge": IMAGE_SIZE},
        do_image_splitting=False,
        image_mean=_HALF,
        image_std=_HALF,
    )
    return Idefics2Processor(images, spec.make_tokenizer(), image_seq_len=spec.visual_tokens)


def llava_processor(spec: Miniature) -> ProcessorMixin:
    """Return the processor of `mini-llava`."""
    images = SiglipImageProcessorPil(
        do_resize=True, size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=_HALF, image_std=_HALF
    )
    return LlavaProcessor(images, spec.make_tokenizer(), patch_size=PATCH_SIZE, vision_feature_select_strategy="full")


_MAKERS = {IDEFICS2.name: idefics2_processor, LLAVA.name: llava_processor}


def save_processor(spec: Miniature, folder: Path) -> None:
    """Write processor and tokenizer files to `folder`.

    The tokenizer is written last and by itself: making an Idefics2 processor adds `<end_of_utterance>` to
    its tokenizer, past the embedding, and the checkpoint of a base model does not have it.
    """
    _MAKERS[spec.name](spec).save_pretrained(folder)
    spec.make_tokenizer().save_pretrained(folder)
