"""A mapping that keeps the most recently used values, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The most recently used values.

    Args:
        limit: bytes (or what `size` counts) that are kept; the newest value is kept even where it is larger.
        size: bytes of a value.
    """

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self._limit, self._measure = limit, size
        self._values: OrderedDict[K, V] = OrderedDict()
        self._bytes = 0

    def get(self, key: K) -> V | None:
        """Return the value of `key`, which is now the newest; None where there is none."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> V:
        """Keep a value, dropping the ones used longest ago where there is no room."""
        if key not in self._values:
            self._values[key] = value
            self._bytes += self._measure(value)
            while self._bytes > self._limit and len(self._values) > 1:
                _, old = self._values.popitem(last=False)
                self._bytes -= self._measure(old)
        return value

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()
        self._bytes = 0
