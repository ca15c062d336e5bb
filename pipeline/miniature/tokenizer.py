"""Word-level tokenizers of the miniature: one plain word, one token; the newline and "Answer:" are tokens too."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pipeline.miniature.lexicon import TOPICS, style_words, value_words

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
