"""Named components that register themselves: one file a component, no `if` on names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from pipeline.errors import InputError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Components of one kind by name.

    The package that holds the components is imported at the first look-up, so a component exists
    as soon as its file does.

    Args:
        kind: what a member is called in messages ("method", "task", "backbone").
        package: dotted name of the package whose modules register members.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._members: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under `name`."""

        def file(member: T) -> T:
            self.add(name, member)
            return member

        return file

    def add(self, name: str, member: T) -> None:
        """File `member` under `name`; a name is given once."""
        if name in self._members:
            raise RuntimeError(f"{self.kind} '{name}' is registered twice")
        self._members[name] = member

    def get(self, name: str) -> T:
        """Return the member called `name`.

        Raises:
            InputError: no such member; the message suggests the nearest name and lists all.
        """
        self._load()
        if name not in self._members:
            raise InputError(f"unknown {self.kind} '{name}'", way_out=nearest(name, self._members))
        return self._members[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._load()
        return sorted(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._members

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the imports: a component may look up another one
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
