"""MMMU-Pro: the letter read out of a reply by the official rules, and the accuracy.

Yue et al. 2024 (MMMU-Pro), and the evaluation script published with it. A reply that cannot be read
draws a random letter, so the number depends on the seed.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pipeline.core.errors import InputError
from pipeline.scores.files import JsonObject, id_field, text_field

_MARKER = "Answer:"
_STRIPPED = ",.!?;:'"
# A reply of this many words or fewer is not searched for the text of an option.
_SHORT_REPLY = 5


@dataclass(frozen=True)
class MmmuProRow:
    """One question: the letter that was read or drawn, and whether it is right."""

    id: str
    pred: str
    random_fallback: bool
    if_right: bool


@dataclass(frozen=True)
class MmmuProScore:
    """MMMU-Pro accuracies as fractions."""

    accuracy: float
    accuracy_deterministic: float | None
    n: int
    n_random_fallback: int
    seed: int
    rows: list[MmmuProRow]

    def as_dict(self) -> JsonObject:
        """Return the numbers as plain JSON values, sums under "overall"."""
        numbers = asdict(self)
        rows = numbers.pop("rows")
        return {"overall": numbers, "rows": rows}


def read_letter(response: str, options: Sequence[str]) -> str | None:
    """Return the letter that a reply chooses, or None where it cannot be read.

    After the last "Answer:" a single option letter decides. Else the whole reply is searched for (X),
    then "X ", then "X.", then, if it is longer than five words, for the text of an option; of several
    finds the one that stands last wins.
    """
    letters = [chr(ord("A") + at) for at in range(len(options))]
    before, marker, after = response.rpartition(_MARKER)
    if marker:
        marked = [letter for letter in letters if letter in after]
        if len(marked) == 1:
            return marked[0]
    # One mark after the other, each from both ends, as the official loop does: not the same as one strip.
    for mark in _STRIPPED:
        response = response.strip(mark)
    reply = f" {response} "
    # (what is looked for, what its place is judged by): a letter counts with "X ", its place with " X ".
    for searched, placed in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        standing = [letter for letter in letters if searched.format(letter) in reply]
        if standing:
            return max(standing, key=lambda letter: reply.rfind(placed.format(letter)))
    lower = reply.lower()
    if len(reply.split()) > _SHORT_REPLY:
        texts = {letter: option.lower() for letter, option in zip(letters, options, strict=True)}
        named = [letter for letter in letters if texts[letter] in lower]
        if named:
            return max(named, key=lambda letter: lower.rfind(texts[letter]))
    return None


def read_options(value: object, where: str) -> list[str]:
    """Return the options of a question: a list, or the Python literal of a list in a string.

    Raises:
        InputError: neither, or an empty list.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, (list, tuple)) or not value:
        way_out = "It holds a Python list literal, as in the published files"
        raise InputError("field 'options' is not a list of options", where=where, way_out=way_out)
    return [str(option) for option in value]


def mmmu_pro_scores(results: Sequence[Mapping[str, object]], seed: int = 0, where: str = "results") -> MmmuProScore:
    """Return the accuracy of replies to MMMU-Pro.

    Args:
        results: rows with "id", "options", "answer" and "response" (an error object in place of a
            response counts as an empty one).
        seed: of the letters drawn for unreadable replies, in the order of the rows.
        where: the file's name, for messages.

    Returns:
        Fractions over all rows, and over those that could be read (None where none could).

    Raises:
        InputError: no row, or a bad row.
    """
    if not results:
        raise InputError("holds no result", where=where, way_out="Give at least one record")
    draw = random.Random(seed)
    rows = []
    for number, row in enumerate(results):
        at = f"{where}, record {number}"
        key, truth = id_field(row, "id", at), text_field(row, "answer", at)
        options = read_options(row.get("options"), at)
        response = "" if isinstance(row.get("response"), dict) else text_field(row, "response", at)
        read = read_letter(response, options)
        letter = read if read is not None else draw.choice([chr(ord("A") + at) for at in range(len(options))])
        rows.append(MmmuProRow(id=key, pred=letter, random_fallback=read is None, if_right=letter == truth))
    readable = [row for row in rows if not row.random_fallback]
    return MmmuProScore(
        accuracy=sum(row.if_right for row in rows) / len(rows),
        accuracy_deterministic=sum(row.if_right for row in readable) / len(readable) if readable else None,
        n=len(rows),
        n_random_fallback=len(rows) - len(readable),
        seed=seed,
        rows=rows,
    )
