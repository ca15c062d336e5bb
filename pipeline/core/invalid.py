"""pydantic's complaints as the project's: one line that names the field, the value and the nearest known name."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.core.errors import InputError, nearest

M = TypeVar("M", bound=BaseModel)
_SHOWN = 80  # characters of a value in an error


def validate(model: type[M], raw: Any, where: str, *, noun: str = "key", way_out: str | None = None) -> M:
    """Return `raw` as a `model`.

    Args:
        model: what it has to be.
        raw: plain values, as a file holds them.
        where: what the error names: a file, a section, a method.
        noun: what a field of `model` is called by users.
        way_out: for a value that does not fit; an unknown field has the nearest known one.

    Raises:
        InputError: the first complaint, with the field's path below `where`.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _explained(model, error, where, noun, way_out) from None


def _explained(
    model: type[BaseModel], error: ValidationError, where: str, noun: str, way_out: str | None
) -> InputError:
    complaints = error.errors()
    first, parent = complaints[0], complaints[0]["loc"][:-1]
    field = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, parent)
        return InputError(f"unknown {noun} '{field}'", where=where, way_out=nearest(str(first["loc"][-1]), known))
    # of a field that may be one thing or another there is a complaint for each, whose place ends with the thing's name
    alternatives = bool(first["loc"]) and first["loc"][-1] not in _fields_at(model, parent)
    same = [other for other in complaints if other["loc"][:-1] == parent and other["input"] == first["input"]]
    same = same if alternatives else [first]
    if len(same) > 1:
        field = _path(parent)
    says = "; or ".join(complaint["msg"] for complaint in same)
    more = f" (and {len(complaints) - len(same)} more)" if len(complaints) > len(same) else ""
    value = repr(first["input"])
    got = f", got {value if len(value) <= _SHOWN else f'{value[:_SHOWN]}...'}"
    what = f"{field}: {says}{'' if first['type'] == 'missing' else got}{more}" if field else f"{says}{more}"
    return InputError(what, where=where, way_out=way_out)


def _path(parts: tuple[Any, ...]) -> str:
    """Return where a field stands, in one line whatever a file calls it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in ".".join(map(str, parts)))


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the names of the fields of the section that `path` leads to."""
    current: Any = model
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        annotation = field.annotation if field else current
        candidates = (annotation, *getattr(annotation, "__args__", ()))
        sections = (kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
        current = next(sections, annotation)
    return list(getattr(current, "model_fields", {}))
