"""Every method by name, trained or not: its options, and whether it needs a teacher."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline import adapters
from pipeline.baselines import baselines
from pipeline.errors import InputError, nearest


def names() -> list[str]:
    """Return the names of all methods."""
    return sorted([*adapters.names(), *baselines.names()])


def is_trained(method: str) -> bool:
    """Whether the method has parameters to train.

    Raises:
        InputError: no such method.
    """
    if method in baselines:
        return False
    if method in adapters.names():
        return True
    raise InputError(f"unknown method '{method}'", way_out=nearest(method, names()))


def option_names(method: str) -> list[str]:
    """Return the names of the method's own options."""
    return list(_schema(method).model_fields)


def validate_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with defaults filled in, as JSON values.

    Raises:
        InputError: an option does not exist or has a wrong value.
    """
    try:
        return _schema(method).model_validate(options).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(f"{method} has no option '{name}'", way_out=nearest(name, option_names(method))) from None
        raise InputError(f"{method}: option '{name}': {first['msg']}, got {first.get('input')!r}") from None


def uses_teacher(method: str, options: dict[str, Any]) -> bool:
    """Whether training compares with the frozen model on demonstrations."""
    return is_trained(method) and adapters.teacher_of(method, options) is not None


def _schema(method: str) -> type[BaseModel]:
    return adapters.options_of(method) if is_trained(method) else baselines.get(method).Options
