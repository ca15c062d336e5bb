"""Official files: found, digested, and read record by record, with errors that name file, record and field."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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


_CHUNK = 1 << 22  # bytes; large enough that the loop's own cost vanishes beside the C scanner's
_SPACE = re.compile(r"[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=\{)")
_HALF_NUMBER = re.compile(r"\.|[eE][+-]?")  # what follows "1" in "1.5" or "1e-5" where the text ends in between
_LITERALS = ("true", "false", "null", "-Infinity", "Infinity", "NaN")
_NOT_JSON = (
    (b"PK\x03\x04", "it is a zip archive", "Unpack it and point to the .json file inside"),
    (b"\x1f\x8b", "it is a gzip archive", "Unpack it and point to the .json file inside"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself", "Fetch it with 'git lfs pull'"),
    (b"<", "it is a web page, not JSON", "The download answered with a page; download the file again"),
)


class RecordFile:
    """The records of the top-level lists of one JSON file, one at a time.

    Iterating yields `(list name, running number from 0, record)`. A 388 MB annotation file costs a few
    megabytes of memory, because no more than one block of text is held. Everything else at the top level
    is in `header` when the iteration ends (and as soon as it has been passed, while it lasts).

    Args:
        path: the file; UTF-8, a byte-order mark is tolerated.
        lists: the top-level lists whose records are wanted; each must be there.
        expect: top-level values that must be so, such as `{"data_subtype": "train2014"}`.

    Raises:
        InputError: while iterating: not JSON, cut short, another shape, a list or an expected value missing.
    """

    def __init__(self, path: Path, lists: Sequence[str], *, expect: Mapping[str, object] | None = None) -> None:
        self.path, self.lists, self.expect = path, tuple(lists), dict(expect or {})
        self.header: dict[str, object] = {}
        self._scan = json.JSONDecoder().raw_decode
        self._reset()

    def _reset(self) -> None:
        self._text, self._pos, self._passed, self._bytes_read = "", 0, 0, 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._file: BinaryIO = io.BytesIO()
        self._list, self._number = "", 0

    def __iter__(self) -> Iterator[tuple[str, int, dict[str, object]]]:
        self._reset()
        self.header = {}
        try:
            size = self.path.stat().st_size
            self._file = self.path.open("rb")
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", where=str(self.path)) from error
        with self._file:
            self._refuse_other_formats(size)
            yield from self._top_level()

    def _refuse_other_formats(self, size: int) -> None:
        if size == 0:
            raise InputError("the file is empty", where=str(self.path), way_out="Download it again")
        start = self._file.read(64)
        self._file.seek(0)
        for magic, problem, way_out in _NOT_JSON:
            if start.startswith(magic):
                raise InputError(problem, where=str(self.path), way_out=way_out)

    def _top_level(self) -> Iterator[tuple[str, int, dict[str, object]]]:
        place = "before the first value"
        if self._peek(place) != "{":
            value = "a list" if self._peek(place) == "[" else "no JSON object"
            wanted = " and ".join(f"'{name}'" for name in self.lists)
            raise InputError(
                f"the top level is {value}; an object with {wanted} is needed",
                where=str(self.path),
                way_out="Is this the official file, unchanged?",
            )
        self._pos += 1
        seen: list[str] = []
        mark = self._peek("after '{'")
        while mark != "}":
            key = self._value("a key of the top level")
            if not isinstance(key, str):
                raise self._malformed(self._pos, "a key of the top level must be a string", "at the top level")
            self._punctuation((":",), f"after the key '{key}'")
            seen.append(key)
            if key in self.lists:
                yield from self._records(key)
            else:
                self._peek(f"in '{key}'")
                self.header[key] = self._value(f"in '{key}'")
                self._check_expected(key)
            mark = self._punctuation((",", "}"), f"after '{key}'")
            if mark == ",":
                self._peek(f"after '{key}'")
        if not seen:
            self._pos += 1
        self._finish(seen)

    def _finish(self, seen: list[str]) -> None:
        """Check what can be known only at the end of the file."""
        missing = [name for name in self.lists if name not in seen]
        if missing:
            way_out = f"The file has {', '.join(seen) or 'nothing'} at its top level; were two files swapped?"
            raise InputError(f"the list '{missing[0]}' is missing", where=str(self.path), way_out=way_out)
        for key in self.expect:
            self._check_expected(key)
        if self._peek("after the end", end_allowed=True):
            raise self._malformed(self._pos, "there is text after the closing '}'", "at the end")

    def _records(self, name: str) -> Iterator[tuple[str, int, dict[str, object]]]:
        self._list, self._number = name, 0
        if self._peek(f"in '{name}'") != "[":
            raise InputError(
                f"'{name}' is not a list", where=str(self.path), way_out="Is this the official file, unchanged?"
            )
        self._pos += 1
        if self._peek(f"in the list '{name}'") == "]":
            self._pos += 1
            return
        while True:
            record = self._record()
            if not isinstance(record, dict):
                raise InputError(
                    f"record {self._number} of '{name}' is a {type_name(record)}",
                    where=str(self.path),
                    way_out="Every record must be an object",
                )
            yield name, self._number, record
            following = _NEXT.match(self._text, self._pos)
            if following is not None:
                self._pos = following.end()
            else:
                place = f"after record {self._number} of '{name}'"
                if self._punctuation((",", "]"), place) == "]":
                    return
                self._peek(place)
            self._number += 1

    def _record(self) -> Any:
        # The quick way for all but the last record of a block; no message is prepared for it.
        try:
            record, end = self._scan(self._text, self._pos)
        except (ValueError, RecursionError):
            end = len(self._text)
        if end == len(self._text):
            return self._value(f"in record {self._number} of '{self._list}'")
        self._pos = end
        return record

    def where(self) -> str:
        """Return what a message calls the record that the iteration is at."""
        return f"{self.path}: record {self._number} of '{self._list}'"

    def _check_expected(self, key: str) -> None:
        if key not in self.expect:
            return
        wanted, value = self.expect[key], self.header.get(key)
        if value != wanted:
            problem = f"'{key}' is '{value}'" if key in self.header else f"'{key}' is missing"
            way_out = "The file belongs to another split; were the train and the val file swapped or renamed?"
            raise InputError(f"{problem}, but '{wanted}' is needed here", where=str(self.path), way_out=way_out)

    # Scanning -----------------------------------------------------------------------------------------

    def _more(self) -> bool:
        """Append the next block to the unread text; False at the end of the file."""
        # As much again as is held: a value longer than a block is scanned a few times, not once a block.
        block = self._file.read(max(_CHUNK, len(self._text) - self._pos))
        if not block and self._decoder.getstate()[0] == b"":
            return False
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(
                f"is not UTF-8 (near byte {self._bytes_read + error.start})",
                where=str(self.path),
                way_out="Download it again; the official files are UTF-8",
            ) from error
        self._bytes_read += len(block)
        self._passed += _encoded_length(self._text[: self._pos])
        self._text = self._text[self._pos :] + text
        self._pos = 0
        return True

    def _peek(self, place: str, *, end_allowed: bool = False) -> str:
        """Skip white space; return the next character without taking it."""
        while True:
            self._pos = _SPACE.match(self._text, self._pos).end()  # type: ignore[union-attr]  # it matches ""
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._more():
                if end_allowed:
                    return ""
                raise self._cut_short(place)

    def _punctuation(self, allowed: tuple[str, ...], place: str) -> str:
        mark = self._peek(place)
        if mark not in allowed:
            raise self._malformed(self._pos, f"'{mark}' stands where {' or '.join(allowed)} is needed", place)
        self._pos += 1
        return mark

    def _value(self, place: str) -> Any:
        """Take one JSON value."""
        while True:
            try:
                value, end = self._scan(self._text, self._pos)
            except json.JSONDecodeError as error:
                if (incomplete := _incomplete(self._text, error)) and self._more():
                    continue
                if incomplete:
                    raise self._cut_short(place) from error
                raise self._malformed(error.pos, error.msg, place) from error
            except (ValueError, RecursionError) as error:
                raise self._malformed(self._pos, str(error), place) from error
            if end == len(self._text) and self._more():
                continue  # a number may go on in the next block
            self._pos = end
            return value

    def _cut_short(self, place: str) -> InputError:
        way_out = "It is cut short: the download or copy was probably interrupted; get it again"
        return InputError(f"the file ends {place} (byte {self._bytes_read})", where=str(self.path), way_out=way_out)

    def _malformed(self, pos: int, what: str, place: str) -> InputError:
        byte = self._passed + _encoded_length(self._text[:pos])
        way_out = "The file is damaged or was edited; get it again"
        return InputError(f"is not valid JSON {place} (byte {byte}: {what})", where=str(self.path), way_out=way_out)


def _incomplete(text: str, error: json.JSONDecodeError) -> bool:
    """Tell whether more text could mend the error: it is an open string, or at the very end of the text."""
    rest = text[error.pos :]
    return (
        not rest
        or error.msg.startswith("Unterminated string")
        or (error.msg.startswith("Invalid \\") and len(rest) < 12)
        or _HALF_NUMBER.fullmatch(rest) is not None
        or (error.msg == "Expecting value" and any(word.startswith(rest) for word in _LITERALS))
    )


def _encoded_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
