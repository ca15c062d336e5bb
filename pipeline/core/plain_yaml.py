"""YAML as DVC reads and writes it (YAML 1.2), so that no file can run code, grow beyond memory or go round in circles.

The parser is DVC's own with DVC's own settings: a value that DVC tracks as a parameter is the value that is trained
with. `1e-5` is a number, `0o17` is 15, `017` is 17, `yes`, `on` and `12:30` are text (PyYAML, which follows YAML 1.1,
reads every one of them otherwise).
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import JsonValue

from pipeline.core.errors import InputError, of_an_extra

if TYPE_CHECKING:
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import SafeConstructor
    from ruamel.yaml.nodes import ScalarNode

Json = dict[str, JsonValue]  # a mapping of plain values, as JSON and YAML have them

MAX_CHARACTERS = 4_000_000
MAX_VALUES = 200_000  # after every alias is written out
MAX_DEPTH = 100  # the parser in C has no limit of its own and ends the process


def read(text: str, where: str) -> Any:
    """Return the document in `text`: plain values alone.

    Aliases are counted as if written out, before anything is built: nine lines of them can stand for a thousand
    million values ("billion laughs").

    Raises:
        InputError: no YAML, a key twice, a date, a tag that asks for an object of Python, too large, or an alias of
            itself.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"has {len(text)} characters, more than {MAX_CHARACTERS}", where=where)
    parser = _parser()
    from ruamel.yaml.error import YAMLError

    try:
        _measure(text, where)
        return parser.load(text)
    except (YAMLError, ValueError) as error:  # ValueError: `0o_`, a number of 5,000 digits, half a surrogate pair
        raise InputError(f"not readable as YAML: {_in_one_line(error)}", where=where) from None
    except _ADate as error:
        raise InputError(f"YAML takes {error} for a date", where=where, way_out="Put it in quotes") from None


def read_file(path: Path) -> Any:
    """Return the document in a file.

    Raises:
        FileNotFoundError: no such file.
        InputError: as `read` has it, or the file is not UTF-8.
    """
    try:
        return read(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"not readable as YAML: {error}", where=str(path)) from None


def write(value: Any) -> str:
    """Return plain values as a document that `read` and DVC read as the same values, keys in their order."""
    writer = _parser()
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.allow_unicode = True
    writer.width = MAX_CHARACTERS
    text = io.StringIO()
    writer.dump(value, text)
    return text.getvalue()


def with_value(text: str, where: str, key: str, value: Any) -> str:
    """Return a document with the value of one of its keys replaced; comments and everything else stay as written.

    Raises:
        InputError: as `read` has it, or the document is no mapping with that key.
    """
    known = read(text, where)
    if not isinstance(known, dict) or key not in known:
        raise InputError(f"has no key '{key}'", where=where, way_out=f"Write a line `{key}: {value}`")
    editor = _yaml()  # keeps comments, order and quotes
    editor.preserve_quotes = True
    editor.width = MAX_CHARACTERS
    document = editor.load(text)
    document[key] = value
    edited = io.StringIO()
    editor.dump(document, edited)
    return edited.getvalue()


class _ADate(Exception):
    pass


def _yaml(kind: str | None = None) -> YAML:
    with of_an_extra():
        from ruamel.yaml import YAML

    return YAML(typ=kind)


@functools.cache
def _constructor() -> type[SafeConstructor]:
    from ruamel.yaml.constructor import SafeConstructor

    class Plain(SafeConstructor):
        """Values without dates: what looks like one is a revision, a name, a release; DVC would hold it as a date."""

    def refuse_date(_: SafeConstructor, node: ScalarNode) -> NoReturn:
        raise _ADate(f"'{node.value}' (line {node.start_mark.line + 1})")

    Plain.add_constructor("tag:yaml.org,2002:timestamp", refuse_date)
    return Plain


def _parser() -> YAML:
    parser = _yaml("safe")
    parser.Constructor = _constructor()
    return parser


def _measure(text: str, where: str) -> None:
    """Refuse a document that is nested too deep or stands for too many values, without building any of them."""
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

    sizes: dict[str, int | None] = {}  # of anchors; None while the anchor's own value is open
    total = 0
    open_values: list[tuple[str | None, int]] = []  # anchor, and how many values stood before
    for event in _yaml("safe").parse(text):
        if isinstance(event, AliasEvent):
            size = sizes.get(event.anchor, 0)  # an unknown one is refused by the parser
            if size is None:
                raise InputError(f"an alias stands for itself (line {event.start_mark.line + 1})", where=where)
            total += size
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_values.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, NodeEvent):
            if isinstance(event, CollectionStartEvent):
                open_values.append((event.anchor, total))
                if len(open_values) > MAX_DEPTH:
                    raise InputError(f"nested too deep (line {event.start_mark.line + 1})", where=where)
            if event.anchor is not None:
                sizes[event.anchor] = None if isinstance(event, CollectionStartEvent) else 1
            total += 1
    if total > MAX_VALUES:
        raise InputError(
            f"stands for {total:.3g} values once its aliases are written out, more than {MAX_VALUES}", where=where
        )


def _in_one_line(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    said = f"{problem}, line {mark.line + 1}" if problem and mark else str(error)
    return " ".join(said.split())
