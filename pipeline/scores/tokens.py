"""Stanford's PTBTokenizer as pycocoevalcap runs it, one Java start for a whole batch of captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from pipeline.core.errors import WorkError
from pipeline.scores.java import run_java

_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_ARGUMENTS = ("-cp", _JAR.name, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)
# What Java ends a line at. One left inside a caption would shift every later caption to another image.
_LINE_BREAKS = re.compile("[\n\r\v\f\u2028\u2029]")


def tokenise(captions: Sequence[str]) -> list[str]:
    """Return the tokens of each caption in lower case, joined by spaces, punctuation dropped.

    All captions go through one run and in their order, as in the published code: the tokenizer looks past the end of a
    line, so that a letter's period at the end of a caption ("a vitamin C.") falls or stays with what the next one
    begins with.

    Args:
        captions: raw captions; a line break inside one counts as a space.

    Raises:
        InputError, WorkError: no Java, or it failed.
    """
    return _run(list(captions))


@lru_cache(maxsize=4)
def tokenise_references(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Return the same, remembered: references that are scored against again and again cost Java once."""
    return tuple(_run(list(captions)))


def _run(captions: list[str]) -> list[str]:
    lines = [_LINE_BREAKS.sub(" ", caption) for caption in captions]
    if not any(line.strip() for line in lines):
        return [""] * len(lines)
    # Java ends its output with a line break, so the last piece of the split is empty.
    answer = run_java(_ARGUMENTS, "\n".join(lines) + "\n", folder=_JAR.parent).split("\n")[:-1]
    if len(answer) != len(lines):
        raise WorkError(
            f"PTBTokenizer answered {len(answer)} lines for {len(lines)} captions",
            where=str(_JAR),
            way_out="A caption holds a control character that Java takes for a line break: remove it",
        )
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in answer]
