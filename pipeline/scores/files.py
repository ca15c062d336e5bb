"""Official result and annotation files, read with an error that names file, record and field.

Every scorer reads through this module, so that a truncated, misshapen or foreign file ends in one
line a user can act on and never in a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import InputError

JsonObject = dict[str, object]  # as a file has it: its fields are read by `text_field` and `id_field`
_SHOWN_IDS = 5
_Key = TypeVar("_Key", bound=Hashable)
_Row = TypeVar("_Row")


def read_text(path: str | Path) -> str:
    """Return the UTF-8 text of `path`, a byte order mark tolerated.

    Raises:
        InputError: the file is missing, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), way_out="Check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8 text (byte {error.start})", where=str(path), way_out="Save the file as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be read: {reason}", where=str(path), way_out="Give a readable file") from None


def read_json(path: str | Path) -> Any:
    """Return what the JSON file `path` holds.

    Raises:
        InputError: the file is missing, or not JSON (a truncated download, for one).
    """
    return _parse(read_text(path), str(path))


def read_records(path: str | Path) -> list[JsonObject]:
    """Return the records of `path`: a JSON array of objects, or JSON Lines with one object a line.

    Raises:
        InputError: the file is missing, not JSON, or holds something other than objects.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return records(_parse(text, str(path)), str(path))
    rows = []
    # Only "\n" ends a line of JSON Lines: str.splitlines would also cut inside strings at U+2028 and the like.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(as_object(_parse(line, f"{path}, line {number}"), f"{path}, line {number}"))
    if not rows:
        raise InputError("holds no record", where=str(path), way_out="Give a JSON array or one JSON object a line")
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"not valid JSON ({error})", where=where, way_out="The file may be truncated: write or download it again"
        ) from None


def as_object(value: object, where: str) -> JsonObject:
    """Return `value` if it is a JSON object, or raise an InputError that names `where`."""
    if not isinstance(value, dict):
        raise InputError(f"a JSON object is expected, found {_kind(value)}", where=where, way_out="Check the shape")
    return value


def records(value: object, where: str) -> list[JsonObject]:
    """Return `value` if it is a JSON array of objects, or raise an InputError that names the first bad record."""
    if not isinstance(value, list):
        way_out = "Check that this is the right file"
        raise InputError(f"an array of records is expected, found {_kind(value)}", where=where, way_out=way_out)
    for number, row in enumerate(value):
        as_object(row, f"{where}, record {number}")
    return value


def record_list(value: object, name: str, where: str) -> list[JsonObject]:
    """Return the array of records under the key `name` of an official file's top-level object."""
    content = as_object(value, where)
    if name not in content:
        raise InputError(
            f"has no '{name}' (its keys: {', '.join(sorted(map(str, content))[:_SHOWN_IDS]) or 'none'})",
            where=where,
            way_out="Check that this is the right file",
        )
    return records(content[name], f"{where}, '{name}'")


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return the string in the field `name` of one record."""
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise InputError(
            f"field '{name}' must be a string, found {_kind(value)}", where=where, way_out="Correct the record"
        )
    return value


def id_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return the identifier in the field `name` of one record as text.

    Official files write ids as integers, tools that pass through data frames write them as strings:
    both name the same question, so both become the same text here.
    """
    value = _field(row, name, where)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise InputError(
            f"field '{name}' must be an integer or a string, found {_kind(value)}",
            where=where,
            way_out="Correct the record",
        )
    return str(value)


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise InputError(
            f"has no field '{name}' (its fields: {', '.join(sorted(map(str, row))[:_SHOWN_IDS]) or 'none'})",
            where=where,
            way_out="Correct the record",
        )
    return row[name]


def results_by_id(path: str | Path, id_name: str, text_name: str) -> dict[str, str]:
    """Return {id: text} of an official result file `[{id_name: .., text_name: ".."}, ..]`.

    Raises:
        InputError: a bad record, an id that stands twice, or no record at all.
    """
    rows = read_records(path)
    results: dict[str, str] = {}
    for number, row in enumerate(rows):
        place = f"{path}, record {number}"
        key = id_field(row, id_name, place)
        if key in results:
            raise InputError(
                f"{id_name} {printable(key)} stands twice", where=place, way_out="Keep one result for each id"
            )
        results[key] = text_field(row, text_name, place)
    if not results:
        raise InputError("holds no result", where=str(path), way_out="Give at least one record")
    return results


def group_by(rows: Iterable[_Row], key: Callable[[_Row], _Key]) -> dict[_Key, list[_Row]]:
    """Return the rows that share a key, keys in order of first appearance."""
    groups: dict[_Key, list[_Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def need(
    wanted: Iterable[object], known: Container[object], needed: str, *, where: str | None = None, way_out: str
) -> None:
    """Check that every image is known, that is, has what is `needed`.

    Raises:
        InputError: some are not known; the first few are named.
    """
    lacking = [key for key in wanted if key not in known]
    if lacking:
        raise InputError(f"images without {needed} ({first_few(lacking)})", where=where, way_out=way_out)


def first_few(ids: Sequence[object]) -> str:
    """Return the first few of `ids` and how many there are, for an error message."""
    return f"{len(ids)}: {', '.join(map(printable, ids[:_SHOWN_IDS]))}{', ...' if len(ids) > _SHOWN_IDS else ''}"


def printable(identifier: object) -> str:
    """Return an id for an error message, which is one line: quoted and escaped where it holds what breaks that."""
    text = str(identifier)
    return text if text.isprintable() else repr(text)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
