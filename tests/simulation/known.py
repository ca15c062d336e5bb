"""What is worked out again and again from the same input, worked out once: pure functions, by what they are given.

Schedules read the same few records, and ask the same few configurations for their keys, hundreds of times. Nothing here
looks at the disk, the clock or the dice, so a schedule is the same, operation by operation, as without it. What is
known is known of one function: another one that a test puts in its place is asked itself.
"""

from __future__ import annotations

import functools
import hashlib
import marshal
import pathlib
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from pipeline.config.trial import _Config
from pipeline.records import Record
from pipeline.train import trial_run

_MOST = 20_000  # records that are kept; those of old schedules are not asked for, their times and losses differ


def turned() -> dict[tuple[Any, str], Any]:
    """Return what takes the place of the project's own functions, and of Python's, as they are now."""
    own: dict[tuple[Any, str], Any] = {
        (_Config, "key"): property(_by_content(_Config.key.fget)),
        (Record, "parse"): classmethod(_by_text(Record.parse.__func__)),
        (trial_run, "epoch_order"): _by_arguments(trial_run.epoch_order),
        (hashlib, "file_digest"): _file_digest,
    }
    if hasattr(PurePath, "_from_parsed_parts"):  # Python 3.11; later ones join by themselves without parsing again
        flavour = pathlib._Flavour
        own[PurePath, "__truediv__"] = _joined(PurePath.__truediv__)
        own[PurePath, "__fspath__"] = PurePath.__str__
        own[flavour, "parse_parts"] = _parsed(flavour.parse_parts)
    return own


def forget() -> None:
    """Know nothing any more: what these functions call is about to be another, or was."""
    for known in (_by_content, _by_text, _by_arguments):
        known.cache_clear()


@functools.cache
def _by_content(key: Callable[[Any], str]) -> Callable[[Any], str]:
    known: dict[tuple[type, bytes], str] = {}

    def call(config: Any) -> str:
        # version 0 writes equal content as equal bytes, whatever strings are interned
        content = type(config), marshal.dumps(config.__dict__, 0)
        if (found := known.get(content)) is None:
            found = known[content] = key(config)
        return found

    return call


@functools.cache
def _by_text(parse: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[tuple[type, str | bytes], Any] = {}

    def call(cls: type, text: str | bytes, where: str, way_out: str) -> Any:
        if (found := known.get((cls, text))) is None:
            found = parse(cls, text, where, way_out)  # what is damaged says where it lies, and is not kept
            if len(known) > _MOST:
                known.clear()
            known[cls, text] = found
        return found

    return call


@functools.cache
def _by_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.lru_cache(function)


@functools.cache
def _joined(join: Callable[[PurePath, Any], PurePath]) -> Callable[[PurePath, Any], PurePath]:
    def call(path: Any, name: Any) -> Any:
        if type(name) is not str or not name or "/" in name or name == ".":
            return join(path, name)
        whole = object.__new__(type(path))
        whole._drv, whole._root, whole._parts = path._drv, path._root, [*path._parts, name]
        try:
            before = path._str
        except AttributeError:
            before = str(path)
        if before not in ("/", "."):
            whole._str = f"{before}/{name}"
        return whole

    return call


@functools.cache
def _parsed(parse: Callable[[Any, list[str]], tuple[str, str, list[str]]]) -> Callable[..., Any]:
    known = functools.lru_cache(maxsize=10_000)(lambda flavour, *parts: parse(flavour, list(parts)))

    def call(flavour: Any, parts: Sequence[str]) -> tuple[str, str, list[str]]:
        drive, root, parsed = known(flavour, *parts)
        return drive, root, list(parsed)

    return call


_spare: list[bytearray] = []


def _file_digest(file: Any, name: str) -> Any:
    """As `hashlib.file_digest`, in the same reads; that clears a new quarter of a megabyte for each file."""
    buffer = _spare.pop() if _spare else bytearray(2**18)  # of this call alone: others come in between two reads
    whole, view = hashlib.new(name), memoryview(buffer)
    try:
        while size := file.readinto(buffer):
            whole.update(view[:size])
    finally:
        _spare.append(buffer)
    return whole
