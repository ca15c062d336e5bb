"""What lies in `runs/` and `evaluations/`: a frozen, numbered model of each record, and the one place that keeps it.

    trial       a trial's config.json, epochs, end and checkpoint; where a number comes from; what a slot says of it
    store       `runs/`: reads and writes the trials' folders, and locks them; `runs/acts.jsonl`, what was done by hand
    journal     `runs/journal.jsonl`: a line an event
    evaluation  `evaluations/`: scored trials, measurements, the cells of studies

No record imports torch, Ray or MLflow. Each reads what earlier code wrote and says what is wrong in a line.

A file names its number as `schema`; one of before there were numbers has none and counts as 0. What differs between
two numbers is in `Record.upgrades`, one function a step. A number that this code does not know is newer: nothing is
guessed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pipeline.core.errors import InputError, WorkError, validate
from pipeline.core.plain_yaml import Json
from pipeline.core.progress import say

# as JSON has them: neither a string nor a truth value is a number
Number = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]


class NewerRecord(InputError):
    """A file was written by newer code."""


class Unreadable(WorkError):
    """The system did not let a file be read; its content may be as good as ever, so nothing is concluded from it."""

    @classmethod
    def of(cls, error: OSError, path: Path) -> Self:
        """Return the error of the system as one of these."""
        way_out = "Nothing was removed; mend the cause and run the same command again"
        return cls(f"cannot be read: {error.strerror or error}", where=str(path), way_out=way_out)


class Unseen(Unreadable):
    """A client of a shared file system still sees a file as it was before another machine wrote it."""


class _Newer(Exception):  # which pydantic lets through
    """As `NewerRecord`, where the file is not known."""


class Frozen(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Record(Frozen):
    """One file, or one line of a file.

    Attributes:
        schema_number: of what is written.
        upgrades: from a number to the next one; a number that is not there needs no change.
        sparse: whether what is None is left out of the file.
        sealed: whether the file holds a digest of the rest of it as `check`, by which damage is seen. One without is of
            before, or written by hand.
    """

    schema_number: ClassVar[int] = 1
    upgrades: ClassVar[Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
    sparse: ClassVar[bool] = False
    sealed: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "schema" not in data:
            return data
        fields = dict(data)
        check, content = fields.pop("check", None) if cls.sealed else None, dict(fields)
        number = fields.pop("schema")
        if type(number) is not int or number < 0:
            raise ValueError("no schema has such a number")
        if number > cls.schema_number:
            raise _Newer(f"schema {number} was written by newer code, this code knows {cls.schema_number}")
        if check is not None and check != _digest(content):
            raise ValueError("damaged: its check is not that of its content")
        for step in range(number, cls.schema_number):
            fields = cls.upgrades[step](fields) if step in cls.upgrades else fields
        return fields

    @model_serializer(mode="wrap")
    def _numbered(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = {"schema": self.schema_number, **handler(self)}
        return {**fields, "check": _digest(fields)} if self.sealed else fields

    @classmethod
    def parse(cls, text: str | bytes, where: str, way_out: str) -> Self:
        """Read a record; `where` it lies and the `way_out` of a damaged one are for the error.

        Raises:
            InputError: it is damaged or no such record; the message names file and field.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"damaged: {error}", where=where, way_out=way_out) from None
        return cls.of(data, where, way_out)

    @classmethod
    def of(cls, data: object, where: str, way_out: str) -> Self:
        """Return what JSON holds as a record; see `parse`."""
        try:
            fields = {"schema": 0, **data} if isinstance(data, dict) else data
            return validate(cls, fields, where, noun="field", way_out=way_out)
        except _Newer as error:
            raise NewerRecord(str(error), where=where, way_out="Use the code that wrote it, or newer") from None

    @classmethod
    def read(cls, path: Path, way_out: str) -> Self:
        """Read the record that is a file.

        Raises:
            FileNotFoundError: there is none.
            InputError: as `parse`.
            Unreadable: the system does not let it be read now.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise
        except (IsADirectoryError, NotADirectoryError) as error:
            raise InputError(f"not readable: {error.strerror}", where=str(path), way_out=way_out) from None
        except OSError as error:
            raise Unreadable.of(error, path) from error
        return cls.parse(content, str(path), way_out)

    def text(self, indent: int | None = 1) -> str:
        """Return the record as its file has it, or for a line of one (`indent` None) with its fields in order."""
        fields = self.model_dump(exclude_none=self.sparse)
        return json.dumps(fields, indent=indent, sort_keys=indent is not None)


def _digest(fields: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of what JSON holds, whatever its order."""
    return hashlib.sha256(json.dumps(as_written(fields), sort_keys=True).encode()).hexdigest()


R = TypeVar("R", bound=Record)


def as_written(fields: Mapping[str, Any]) -> Json:
    """Return fields as a file has them, in which a number that is a key is text."""
    return json.loads(json.dumps(fields))


def part_of(path: Path, name: str) -> object:
    """Return a part of a trial's or an evaluation's file, as its code wrote it; or all of a file that is the part.

    Raises:
        InputError: there is no such file, or no JSON in it.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), way_out="Give runs/KEY/config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"not readable as JSON: {error}", where=str(path)) from None
    return content[name] if isinstance(content, dict) and name in content else content


def lines(model: type[R], path: Path, way_out: str) -> Iterator[R]:
    """Yield a record for each line of a file; a last line that a crash has torn is left out, which is said.

    Raises:
        InputError: another line is damaged; the message names it.
        Unreadable: as `Record.read`.
    """
    try:
        rows = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise Unreadable.of(error, path) from error
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            yield model.parse(row, f"{path}:{number}", way_out)
        except NewerRecord:
            raise
        except InputError as error:
            if number < len(rows):  # a line that is whole ends with a newline, after which there is an empty rest
                raise
            say_once(f"warning: {error.where}: the last line was torn by a crash and is left out")


@functools.cache
def say_once(text: str) -> None:
    """Print a line about a file that is read again and again."""
    say(text)
