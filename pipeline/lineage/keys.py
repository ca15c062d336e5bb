"""Whether a stored configuration gives the key that it is filed under."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline.trial import KEY_LENGTH, EvaluationConfig, TrialConfig, digest


def key_of(kind: type[TrialConfig] | type[EvaluationConfig], stored: dict[str, Any], stated: str) -> str:
    """Return the key of a stored configuration.

    Code of its own time hashed it as it stands, newer code leaves out later fields at their defaults: where one of the
    two gives `stated`, that is its key.
    """
    plain = digest(stored)[:KEY_LENGTH]
    if plain == stated:
        return plain
    try:
        return kind.model_validate(stored).key
    except ValidationError:
        return plain
