"""YAML from a user, read so that no file can run code, grow beyond memory or go round in circles."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline.errors import InputError

MAX_CHARACTERS = 4_000_000
MAX_VALUES = 200_000  # after every alias is written out; params.yaml has some 2,000


def read(text: str, where: str) -> Any:
    """Return the document in `text`: plain values alone.

    Aliases are counted as if written out, before anything is built: nine lines of them can stand for a thousand
    million values ("billion laughs").

    Raises:
        InputError: no YAML, a tag that asks for an object of Python, too large, or an alias of itself.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"has {len(text)} characters, more than {MAX_CHARACTERS}", where=where)
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:
        raise InputError(f"not readable as YAML: {error}", where=where) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        size = _size(node, {}, where)
        if size > MAX_VALUES:
            raise InputError(
                f"stands for {size:.3g} values once its aliases are written out, more than {MAX_VALUES}", where=where
            )
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise InputError(f"not readable as YAML: {error}", where=where) from None
    except RecursionError:
        raise InputError("nested too deep", where=where) from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int | None], where: str) -> int:
    """Return how many values a node stands for; every node is looked at once."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise InputError(f"an alias stands for itself (line {node.start_mark.line + 1})", where=where)
        return size
    known[id(node)] = None
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inside = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    size = 1 + sum(_size(part, known, where) for part in inside)
    known[id(node)] = size
    return size
