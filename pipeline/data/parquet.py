"""Parquet shards of the benchmarks that are distributed so: their rows, and single images out of them.

An image inside a shard is named `<shard>.parquet#<row>/<column>` (and `/<number>` in a list of images), so
that an `ImageRef.path` can point to it as it points to a file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from pipeline.core.errors import InputError
from pipeline.core.files import stamp

_CELL = re.compile(r"(?P<file>.+\.parquet)#(?P<row>\d+)/(?P<column>[^/]+)(?:/(?P<number>\d+))?")


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
    import pyarrow

    file = _opened(path)
    asked, images = [], set[str]()
    for column in file.schema_arrow:
        listed = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
        kind = column.type.value_type if listed else column.type
        inside = [kind.field(i).name for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
        if "bytes" in inside:
            images.add(column.name)
            # not their bytes: the rest tells how many there are
            rest = [name for name in inside if name != "bytes"] or inside
            asked += [f"{column.name}.{'list.element.' if listed else ''}{name}" for name in rest]
        else:
            asked.append(column.name)
    for number, row in _rows(path, file, asked):
        for name in images:
            cell = row[name]
            if isinstance(cell, list):
                row[name] = [cell_name(path.name, number, name, place) for place in range(len(cell))]
            elif cell is not None:
                row[name] = cell_name(path.name, number, name)
        yield number, row


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
        raise OSError(2, "no such place in a Parquet file")
    try:
        image = _cell(Path(cell["file"]), int(cell["row"]), cell["column"])
    except InputError as error:
        raise OSError(5, str(error)) from error
    if cell["number"] is not None and isinstance(image, list):
        image = image[int(cell["number"])] if int(cell["number"]) < len(image) else None
    if not isinstance(image, dict) or not image.get("bytes"):
        raise OSError(2, "no image stands at this place of the Parquet file")
    return image["bytes"]


def _opened(path: Path) -> Any:
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
