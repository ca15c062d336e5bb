"""Parquet shards, as benchmarks are distributed, and the Arrow files of `save_to_disk`: rows, and single images.

An image inside a shard is named `<shard>.parquet#<row>/<column>` (and `/<number>` in a list of images), so
that an `ImageRef.path` can point to it as it points to a file; `.arrow` likewise.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from pipeline.core.errors import InputError, of_an_extra
from pipeline.core.files import stamp

_CELL = re.compile(r"(?P<file>.+\.(?:parquet|arrow))#(?P<row>\d+)/(?P<column>[^/]+)(?:/(?P<number>\d+))?")


def cell_name(file: str, row: int, column: str, number: int | None = None) -> str:
    """Return the name of an image inside the shard `file`."""
    return f"{file}#{row}/{column}" + ("" if number is None else f"/{number}")


def shard_order(path: str) -> tuple[str, int, str]:
    """Return a sort key that keeps the images of one shard together, by row: each row group is then read once."""
    cell = _CELL.fullmatch(path)
    return (path, 0, "") if cell is None else (cell["file"], int(cell["row"]), path)


def is_cell(path: Path | str) -> bool:
    """Tell whether `path` names an image inside a shard."""
    cell = _CELL.fullmatch(str(path))
    return cell is not None and Path(cell["file"]).is_file()  # a folder's name may look like this, with the `#`


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield row number and the given columns of every row, one block in memory at a time.

    Raises:
        InputError: no Parquet file, cut short, or a column is missing.
    """
    file = _opened(path)
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        way_out = f"The file has {', '.join(file.schema_arrow.names)}; is this the official shard?"
        raise InputError(f"column '{missing[0]}' is missing", where=str(path), way_out=way_out)
    yield from _rows(path, file, list(columns))


def rows_with_images_named(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield row number and all columns of every row, the images inside (`datasets` stores them so) by `cell_name`.

    Raises:
        InputError: no Parquet file, or cut short.
    """
    file = _opened(path)
    asked, labels = [], _labels(file.schema_arrow)
    images = _image_columns(file.schema_arrow)
    for column in file.schema_arrow.names:
        # not their bytes: the rest tells how many there are
        rest = [name for name in images.get(column, ()) if name != "bytes"]
        listed = "list.element." if column in images and _is_list(file.schema_arrow.field(column).type) else ""
        asked += [f"{column}.{listed}{name}" for name in rest] or [column]
    for number, row in _rows(path, file, asked):
        for name in images:
            cell = row[name]
            if isinstance(cell, list):
                row[name] = [cell_name(path.name, number, name, place) for place in range(len(cell))]
            elif cell is not None:
                row[name] = cell_name(path.name, number, name)
        yield number, _with_names(row, labels)


def arrow_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield row number and all columns of every row of an Arrow file, as `rows_with_images_named` does.

    An image of which only the path is stored has that path.

    Raises:
        InputError: no Arrow file, or cut short.
    """
    table = _arrow_table(path, stamp(path))
    labels, images = _labels(table.schema), _image_columns(table.schema)
    number = 0
    for batch in table.to_batches(max_chunksize=256):
        block = batch.select([name for name in table.schema.names if name not in images]).to_pylist()
        places = {name: _places(batch.column(name), inside) for name, inside in images.items()}
        for offset in range(batch.num_rows):
            row = block[offset] if block else {}
            for name, stored in places.items():
                cell = stored[offset]
                if isinstance(cell, list):
                    row[name] = [
                        path_of if path_of else cell_name(path.name, number, name, place)
                        for place, path_of in enumerate(cell)
                    ]
                else:
                    row[name] = None if cell is None else cell or cell_name(path.name, number, name)
            yield number, _with_names(row, labels)
            number += 1


def _places(column: Any, inside: Sequence[str]) -> list[Any]:
    """Return, of each cell of images: the path of one that is not inside, else nothing; None where there is none."""
    import pyarrow
    from pyarrow import compute

    if _is_list(column.type):
        flat = _places(column.flatten(), inside)
        lengths, start, cells = compute.list_value_length(column).to_pylist(), 0, []
        for length in lengths:
            cells.append(None if length is None else flat[start : start + length])
            start += length or 0
        return cells
    if not pyarrow.types.is_struct(column.type):
        return ["" if there else None for there in column.is_valid().to_pylist()]
    held = compute.struct_field(column, "bytes").is_valid().to_pylist()
    paths = compute.struct_field(column, "path").to_pylist() if "path" in inside else [None] * len(held)
    return ["" if bytes_there else path for bytes_there, path in zip(held, paths, strict=True)]


def _is_list(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _image_columns(schema: Any) -> dict[str, tuple[str, ...]]:
    """Return the columns that hold pictures, and the names inside their cells; a cell of mere bytes has none."""
    import pyarrow

    images: dict[str, tuple[str, ...]] = {}
    for column in schema:
        kind = column.type.value_type if _is_list(column.type) else column.type
        if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            images[column.name] = ()
        elif pyarrow.types.is_struct(kind):
            inside = tuple(kind.field(i).name for i in range(kind.num_fields))
            images |= {column.name: inside} if "bytes" in inside else {}
    return images


def _labels(schema: Any) -> dict[str, Sequence[str]]:
    """Return the names of the classes of each column that `datasets` keeps as numbers (`ClassLabel`)."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
        labels = {name: kind["names"] for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
        return {name: [str(label) for label in names] for name, names in labels.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # no note of theirs
        return {}


def _with_names(row: dict[str, object], labels: dict[str, Sequence[str]]) -> dict[str, object]:
    for name, names in labels.items():
        number = row.get(name)
        if isinstance(number, int):
            row[name] = names[number] if 0 <= number < len(names) else None
    return row


def _rows(path: Path, file: Any, columns: list[str]) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow

    number = 0
    batches = file.iter_batches(batch_size=256, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            block = [] if batch is None else batch.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise _damaged(path, f"is damaged after row {number}", error) from error
        if batch is None:
            return
        for row in block:
            yield number, row
            number += 1


def cell_bytes(path: Path | str) -> bytes:
    """Return the bytes of the image that `cell_name` named.

    Raises:
        OSError: the shard, the row or the image in it is missing or cannot be read.
    """
    cell = _CELL.fullmatch(str(path))
    if cell is None:
        raise OSError(2, "no such place in a shard")
    try:
        image = _cell(Path(cell["file"]), int(cell["row"]), cell["column"])
    except InputError as error:
        raise OSError(5, str(error)) from error
    if cell["number"] is not None and isinstance(image, list):
        image = image[int(cell["number"])] if int(cell["number"]) < len(image) else None
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise OSError(2, "no image stands at this place of the shard")
    return content


def _opened(path: Path) -> Any:
    with of_an_extra():
        import pyarrow
        import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _ = file.schema_arrow.names  # damaged names are found here, not by the first who asks for them
        return file
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(path, "is no whole Parquet file", error) from error


def _damaged(path: Path, what: str, error: Exception) -> InputError:
    return InputError(
        f"{what} ({(str(error).splitlines() or [type(error).__name__])[0]})",
        where=str(path),
        way_out="The download was probably interrupted, or it is a Git LFS pointer; get it again",
    )


_READING = Lock()  # of groups: several threads that ask for one wait for the first


def _cell(path: Path, row: int, column: str) -> Any:
    """Return a cell's value; None where the shard has no such row or column."""
    with _READING:
        mark = stamp(path)
        if path.suffix == ".arrow":
            table = _arrow_table(path, mark)
            return table[column][row].as_py() if row < len(table) and column in table.column_names else None
        ends, columns = _groups(path, mark)
        group = bisect_right(ends, row)
        if group == len(ends) or column not in columns:
            return None
        block = _column_of_group(path, mark, group, column)
    return block[row - (ends[group - 1] if group else 0)].as_py()


# The stamp is part of the keys: a replaced file is read again.
@lru_cache(maxsize=64)
def _groups(path: Path, mark: tuple[int, ...]) -> tuple[tuple[int, ...], frozenset[str]]:
    """Return the row number at which each row group ends, and the columns' names."""
    del mark
    file = _opened(path)
    counts = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    return tuple(accumulate(counts)), frozenset(file.schema_arrow.names)


@lru_cache(maxsize=4)
def _column_of_group(path: Path, mark: tuple[int, ...], group: int, column: str) -> Any:
    """Return one column of a row group; the groups of such files hold some 100 rows."""
    import pyarrow

    del mark
    try:
        return _opened(path).read_row_group(group, columns=[column])[column]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(path, f"is damaged in row group {group}", error) from error


@lru_cache(maxsize=16)
def _arrow_table(path: Path, mark: tuple[int, ...]) -> Any:
    """Return an Arrow file as a table that is mapped into memory, not read: a stream, or a file with a footer."""
    with of_an_extra():
        import pyarrow

    del mark
    try:
        source = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).read_all()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(path, "is no whole Arrow file", error) from error
