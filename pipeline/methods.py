"""Every method by name, trained or not: its options and how it is trained."""

from __future__ import annotations

from typing import Any

from pipeline import adapters
from pipeline.adapters.base import METHODS
from pipeline.adapters.options import Decoding, Facts, Options
from pipeline.baselines import baselines
from pipeline.errors import InputError, nearest
from pipeline.trial import TrialConfig


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
    return _schema(method).checked(options, method).model_dump(mode="json")


def facts_of(method: str, options: dict[str, Any]) -> Facts:
    """Return how the method is trained with these options: teacher, loss weights, what it edits."""
    return _schema(method).checked(options, method).facts()


def defaults(method: str) -> dict[str, Any]:
    """Return the training settings that the method brings, where they are not those of all methods."""
    if not is_trained(method):
        return {}
    rate = facts_of(method, {}).learning_rate
    return {} if rate == Facts().learning_rate else {"learning_rate": rate}


def num_shots(method: str, options: dict[str, Any]) -> int:
    """Return how many demonstrations a method without training puts before a question; 0: it puts none."""
    return int(validate_options(method, options).get("num_shots", 0))


def recorded_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a record, with what options that it does not name were before there were any."""
    return _schema(method).completed(options)


def facts(config: TrialConfig) -> Facts:
    """Return how a trial is trained: one that is planned, or one that was recorded."""
    return facts_of(config.method, recorded_options(config.method, config.options))


def summary(method: str) -> str:
    """Return the method in a line."""
    kind: type[object] = METHODS.get(method) if is_trained(method) else baselines.get(method)
    return (kind.__doc__ or "").partition("\n")[0]


def published_decoding(method: str) -> Decoding:
    """Return how the method's published code decodes."""
    return _schema(method).published_decoding


def selects(method: str, options: dict[str, Any]) -> bool:
    """Whether the method looks at the selection split: to choose its epoch, or what it needs without training."""
    return is_trained(method) or baselines.get(method).Options.checked(options, method).selects()


def _schema(method: str) -> type[Options]:
    return adapters.options_of(method) if is_trained(method) else baselines.get(method).Options
