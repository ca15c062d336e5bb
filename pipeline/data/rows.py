"""Rows of the user's own files: JSON lines, JSON, CSV, Parquet, or a folder in a layout that `datasets` loads.

A folder may hold `metadata.jsonl` (or `.csv`, `.parquet`) beside pictures, in itself or in a folder a split; or data
files, in itself or in `data/`, whose names or folders begin with their split (`train.jsonl`, `train/rows.csv`,
`test-00000-of-00002.parquet`); or what `save_to_disk` wrote, pictures inside too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import InputError
from pipeline.data.official import type_name
from pipeline.data.parquet import arrow_rows, rows_with_images_named

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_STATE = "state.json"  # of what `save_to_disk` wrote
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "selection": ("selection", "validation", "valid", "val", "dev"),
    "evaluation": ("evaluation", "eval", "test", "testing"),
}
_CSV_CELL = 1 << 27  # characters of one cell at most


class Row(NamedTuple):
    """One row.

    Attributes:
        file: that it stands in.
        line: in the file, from 1; of files that have no lines, the row's number.
        split: what the file's name or folder says of it; empty where it says nothing.
        values: by column.
        problem: why it has no values, or nothing.
    """

    file: Path
    line: int
    split: str
    values: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Part:
    """One file of a data set, and the split that its name says."""

    file: Path
    split: str = ""


def parts(path: Path) -> tuple[Part, ...]:
    """Return the files of a data set, in order.

    Raises:
        InputError: there is none, or none of a kind that is read.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            way_out = f"Give {', '.join(SUFFIXES)} or a folder; .json holds a list of objects"
            raise InputError(f"is a '{path.suffix or 'file without an extension'}'", where=str(path), way_out=way_out)
        return (Part(path),)
    if not path.is_dir():
        raise InputError("no such file or folder", where=str(path), way_out="Give the file of your samples")
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir())
    for folders in ([path], inside):
        described = [folder / name for folder in folders for name in _METADATA if (folder / name).is_file()]
        if described:
            return tuple(Part(file, split_of(file.parent.name) if file.parent != path else "") for file in described)
    saved = [Part(file, split_of(folder.name)) for folder in (path, *inside) for file in _saved(folder)]
    if saved:
        return tuple(saved)
    for folder in (path, path / "data"):
        files = [Part(file, split_of(file.stem)) for file in _data_files(folder)]
        by_split = [name for name in sorted(folder.glob("*/")) if split_of(name.name)]
        files = files or [Part(file, split_of(name.name)) for name in by_split for file in _data_files(name)]
        if files:
            return tuple(files)
    way_out = f"It needs {', '.join(_METADATA)} beside pictures, or files of {', '.join(SUFFIXES[:-1])}"
    if any(file.suffix.lower() in _PICTURES for folder in (path, *inside) for file in folder.iterdir()):
        way_out = "Name each picture and its answer in metadata.csv beside them, with the columns file_name and answer"
    raise InputError("no samples were found in the folder", where=str(path), way_out=way_out)


def _data_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES[:-1])
    return [file for file in files if file.name not in ("dataset_info.json", "dataset_dict.json", _STATE)]


def _saved(folder: Path) -> list[Path]:
    """Return the files of a data set that `save_to_disk` wrote; what else lies beside them, such as a cache, is none.

    Raises:
        InputError: one of them is missing.
    """
    state = folder / _STATE
    if not state.is_file():
        return []
    try:
        files = [folder / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("is not as save_to_disk writes it", where=str(state), way_out="Save it again") from error
    missing = next((file for file in files if file.parent != folder or not file.is_file()), None)
    if missing is not None:
        raise InputError(f"names {missing.name}, which is not there", where=str(state), way_out="Save it again")
    return files


def split_of(name: str) -> str:
    """Return the split that the name of a file or folder says, as it says it; empty where it says none."""
    word = name.lower().split("-")[0].split("_")[0].split(".")[0]
    return word if any(word in names for names in SPLIT_NAMES.values()) else ""


def read(part: Part) -> Iterator[Row]:
    """Yield the rows of a file; one that cannot be read as a row has a `problem`.

    Raises:
        InputError: the file cannot be read as what it is.
    """
    kind = part.file.suffix.lower()
    reader = {".jsonl": _lines, ".json": _list, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".arrow": _arrow}
    try:
        for line, values, problem in reader[kind](part.file):
            yield Row(part.file, line, part.split, values, problem)
    except UnicodeDecodeError as error:
        problem = f"{_not_utf8(part.file)} is not UTF-8"
        raise InputError(problem, where=str(part.file), way_out="Save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(part.file)) from error


def _not_utf8(path: Path) -> str:
    """Return the line, and the byte in it, that no decoder of UTF-8 takes."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                text.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1},"
    return "the file"


_Read = Iterator[tuple[int, Mapping[str, Any], str]]


def _lines(path: Path) -> _Read:
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            line = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except UnicodeDecodeError as error:
                yield number, {}, f"is not UTF-8 (byte {error.start + 1} of the line)"
                continue
            except (ValueError, RecursionError) as error:
                yield number, {}, f"is no JSON ({error}): {line[:60].decode(errors='replace').strip()}"
                continue
            yield number, *_object(values)


def _object(values: object) -> tuple[Mapping[str, Any], str]:
    whole = "; a file that is one list is called .json" if isinstance(values, list) else ""
    return (values, "") if isinstance(values, dict) else ({}, f"is a {type_name(values)}, an object is needed{whole}")


def _list(path: Path) -> _Read:
    try:
        whole = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        if str(error).startswith("Extra data: line 2"):  # JSON lines: `datasets` reads them under this name too
            yield from _lines(path)
            return
        raise InputError(f"is no JSON ({error})", where=str(path), way_out="Rows one a line are .jsonl") from error
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else whole
    if not isinstance(whole, list):
        raise InputError("holds no list of objects", where=str(path), way_out="Write [{...}, {...}], a row each")
    for number, values in enumerate(whole, start=1):
        yield number, *_object(values)


def _csv(path: Path) -> _Read:
    csv.field_size_limit(_CSV_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        between = "\t" if path.suffix.lower() == ".tsv" else next((mark for mark in ",;\t" if mark in head), ",")
        reader = csv.DictReader(file, delimiter=between, strict=True)
        names = reader.fieldnames or []
        if not any(names) or len(set(names)) < len(names):
            problem = "a column's name stands twice in" if any(names) else "no names of columns stand in"
            raise InputError(
                f"{problem} the first line: {head.strip()[:80]}", where=str(path), way_out="Mend that line"
            )
        while True:
            begun = reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                way_out = "Mend that line: a quotation mark in it may not be closed"
                raise InputError(f"line {begun}: {error}", where=str(path), way_out=way_out) from error
            if values is None:
                return
            short = sum(value is None for value in values.values())
            if None in values or short:
                more = len(values.get(None) or ())  # type: ignore[call-overload]  # where csv puts what has no name
                problem = f"has {len(names) + more - short} columns, the first line has {len(names)}"
                yield reader.line_num, {}, problem
                continue
            yield reader.line_num, {name: value for name, value in values.items() if value != ""}, ""


def _parquet(path: Path) -> _Read:
    for number, values in rows_with_images_named(path):
        yield number + 1, {name: value for name, value in values.items() if value is not None}, ""


def _arrow(path: Path) -> _Read:
    for number, values in arrow_rows(path):
        yield number + 1, {name: value for name, value in values.items() if value is not None}, ""
