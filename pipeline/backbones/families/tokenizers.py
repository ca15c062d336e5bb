"""Small tokenizers of the real classes, trained at load time on a committed text (variant tiny)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MERGES = 400  # beside the bytes: enough that common words are one token and rare ones several


def _train(
    pre_tokenizer: Any, lines: Sequence[str], start: list[str], alphabet: list[str]
) -> tuple[dict[str, int], list[Any]]:
    import json

    import tokenizers
    from tokenizers import models, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=len(start) + len(alphabet) + 64 + MERGES,
        special_tokens=start,
        initial_alphabet=alphabet,
        min_frequency=2,
        show_progress=False,
    )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def llama_tokenizer(lines: Sequence[str], special: Mapping[str, str]) -> Any:
    """Return a LlamaTokenizer: byte fallback, words that begin with a visible space, `<s>` in front.

    Args:
        lines: the training text.
        special: special tokens by role; unk, bos and eos get ids 0, 1 and 2, the rest come last, as published.
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import LlamaTokenizer

    start = [special["unk"], special["bos"], special["eos"], *(f"<0x{byte:02X}>" for byte in range(256))]
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    # No learnt token holds a letter and a punctuation mark, as in the published vocabularies.
    marks, digits = pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.Sequence([space, marks, digits])
    vocab, merges = _train(words, lines, start, [])
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=special["unk"],
        bos_token=special["bos"],
        eos_token=special["eos"],
        add_bos_token=True,
    )
    rest = [text for text in special.values() if text not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in rest])
    tokenizer.pad_token = special["pad"]
    return tokenizer


def qwen2_tokenizer(lines: Sequence[str], special: Mapping[str, str]) -> Any:
    """Return a Qwen2Tokenizer: byte-level BPE with Qwen's way of splitting words, no start token.

    Args:
        lines: the training text.
        special: special tokens by role; all of them come after the vocabulary, as published.
    """
    from tokenizers import AddedToken, Regex, pre_tokenizers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    vocab, merges = _train(words, lines, [], sorted(pre_tokenizers.ByteLevel.alphabet()))
    for text in dict.fromkeys(special.values()):
        vocab[text] = len(vocab)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=special["pad"],
        eos_token=special["eos"],
        pad_token=special["pad"],
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in dict.fromkeys(special.values())])
    return tokenizer
