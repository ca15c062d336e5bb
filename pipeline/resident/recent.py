"""A mapping that keeps the most recently used values, up to a number of bytes."""

from __future__ import annotations

from typing import TypeVar

from cachetools import LRUCache

K = TypeVar("K")
V = TypeVar("V")


class Recent(LRUCache[K, V]):
    """The most recently used values; one that is larger than all the room is given back and not kept.

    Args:
        maxsize: bytes, or what `getsizeof` counts.
        getsizeof: bytes of a value.
    """

    def put(self, key: K, value: V) -> V:
        """Keep a value, dropping those used longest ago where there is no room; return it, or the one kept before."""
        return self.setdefault(key, value) if self.getsizeof(value) <= self.maxsize else value
