"""Stanford's PTBTokenizer as pycocoevalcap runs it, one Java start for a whole batch of captions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from pipeline.errors import WorkError
from pipeline.scores.java import run_java

_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_ARGUMENTS = ("-cp", str(_JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)
# What Java ends a line at. One left inside a caption would shift every later caption to another image.
_LINE_BREAKS = re.compile("[\n\r\v\f\u2028\u2029]")
_CACHED_CAPTIONS = 1 << 20

_tokenised: dict[str, str] = {}


def tokenise(captions: Iterable[str]) -> dict[str, str]:
    """Return {caption: its tokens in lower case, joined by spaces, punctuation dropped}.

    The result is remembered for the life of the process, so references that are scored against
    again and again cost Java once.

    Args:
        captions: raw captions; a line break inside one counts as a space.

    Raises:
        InputError, WorkError: no Java, or it failed.
    """
    wanted = list(dict.fromkeys(captions))
    new = [caption for caption in wanted if caption not in _tokenised]
    if len(_tokenised) + len(new) > _CACHED_CAPTIONS:
        _tokenised.clear()
        new = wanted
    _tokenised.update(zip(new, _run(new), strict=True))
    return {caption: _tokenised[caption] for caption in wanted}


def _run(captions: list[str]) -> list[str]:
    lines = [_LINE_BREAKS.sub(" ", caption) for caption in captions]
    if not any(line.strip() for line in lines):
        return [""] * len(lines)
    # Java ends its output with a line break, so the last piece of the split is empty.
    answer = run_java(_ARGUMENTS, "\n".join(lines) + "\n").split("\n")[:-1]
    if len(answer) != len(lines):
        raise WorkError(
            f"PTBTokenizer answered {len(answer)} lines for {len(lines)} captions",
            where=str(_JAR),
            way_out="A caption holds a control character that Java takes for a line break: remove it",
        )
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in answer]
