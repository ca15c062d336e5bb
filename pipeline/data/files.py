"""Official files: found, digested, and their records' fields read with errors that name file, record and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import files as digests
from pipeline.core.errors import InputError

_TYPE_NAMES = {dict: "object", list: "list", str: "string", int: "whole number", float: "number", bool: "true/false"}


def type_name(value: object) -> str:
    """Return what JSON calls the type of `value`."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


Where = str | Callable[[], str]  # what a message calls the record; a function where naming each would cost time


def field(record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: Where) -> Any:
    """Return `record[name]`, checked to be of type `kind`.

    Args:
        record: one record of an official file.
        name: the key.
        kind: type (or types) the value must have; true/false does not pass as a number.
        where: what the message calls this record (file and running number or id), or a function that says it.

    Raises:
        InputError: the key is missing, its value has another type or is no text that can be written, or the record
            is no object.
    """
    value = record.get(name) if isinstance(record, Mapping) else None
    if isinstance(value, kind) and (not isinstance(value, bool) or kind is bool):
        if not isinstance(value, str) or value.isascii() or _is_text(value):
            return value
        problem = f"field '{name}' holds half a character (a lone surrogate)"
        raise InputError(problem, where=_place(where), way_out="Correct it")
    place = _place(where)
    if not isinstance(record, Mapping):
        raise InputError(f"is a {type_name(record)}", where=place, way_out=f"It must be an object with '{name}'")
    if name not in record:
        way_out = f"The record has the fields {', '.join(sorted(record)) or '(none)'}; is this the official file?"
        raise InputError(f"field '{name}' is missing", where=place, way_out=way_out)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(_TYPE_NAMES.get(k, k.__name__) for k in kinds)
    shown = json.dumps(value, ensure_ascii=False, default=str)[:60]
    raise InputError(f"field '{name}' is {shown} ({type_name(value)})", where=place, way_out=f"It must be a {wanted}")


def _place(where: Where) -> str:
    return where if isinstance(where, str) else where()


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON can spell half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def source_digest(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, in hex.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return digests.file_digest(path)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(path)) from error


def find(root: Path, folders: Sequence[str], name: str) -> Path:
    """Return the first existing `root/<folder>/<name>`, folders in order.

    Raises:
        InputError: it is in none of them; the message lists every place looked at.
    """
    places = [root / folder / name for folder in folders]
    for place in places:
        if place.exists():
            return place
    way_out = "Looked at: " + ", ".join(place.relative_to(root).as_posix() for place in places)
    raise InputError(f"'{name}' was not found under the data root '{root}'", way_out=way_out)
