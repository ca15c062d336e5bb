"""Every method by name, trained or not: its options, checked once at the door, and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline import adapters
from pipeline.adapters.base import METHODS
from pipeline.adapters.options import Facts, Options, PublishedDecoding
from pipeline.baselines import baselines
from pipeline.config.trial import TrialConfig, canonical
from pipeline.core.errors import InputError, nearest

_checked: dict[tuple[str, str], Options] = {}  # by method and what a trial's key has of them


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


def parse(method: str, given: Mapping[str, Any]) -> Options:
    """Return the method's options as a user wrote them, checked, with defaults filled in.

    Raises:
        InputError: an option does not exist or has a wrong value.
    """
    checked = _schema(method).checked(given, method)
    _checked[method, canonical(checked.plain())] = checked
    return checked


def options(config: TrialConfig) -> Options:
    """Return the options of a trial, checked once; a recorded one may be of a time when there were fewer."""
    key = config.method, canonical(config.options)
    if key not in _checked:
        schema = _schema(config.method)
        _checked[key] = schema.checked(schema.completed(config.options), config.method)
    return _checked[key]


def facts(config: TrialConfig) -> Facts:
    """Return how a trial is trained."""
    return options(config).facts()


def defaults(method: str) -> dict[str, float]:
    """Return the training settings that the method brings, where they are not those of all methods."""
    if not is_trained(method):
        return {}
    rate = parse(method, {}).facts().learning_rate
    return {} if rate == Facts().learning_rate else {"learning_rate": rate}


def summary(method: str) -> str:
    """Return the method in a line."""
    kind: type[object] = METHODS.get(method) if is_trained(method) else baselines.get(method)
    return (kind.__doc__ or "").partition("\n")[0]


def published_decoding(method: str) -> PublishedDecoding:
    """Return how the method's published code decodes."""
    return _schema(method).published_decoding


def _schema(method: str) -> type[Options]:
    return adapters.options_of(method) if is_trained(method) else baselines.get(method).Options
