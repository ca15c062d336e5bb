"""Numbers with the digits that mean something."""

from __future__ import annotations


def rounded(value: float) -> float:
    """Return `value` to six significant digits; a whole number as it is."""
    value = float(value)
    return value if value.is_integer() else float(f"{value:.6g}")
