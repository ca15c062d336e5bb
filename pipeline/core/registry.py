"""Named components that register themselves: one file a component here, or an entry point of another package."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Generic, Protocol, TypeVar, cast

from pipeline.core.errors import InputError, require_known

GROUPS = ("hificl.methods", "hificl.backbones", "hificl.tasks", "hificl.measures")  # of entry points


class Named(Protocol):
    """What can be a member: a class or an object with a name."""

    @property
    def name(self) -> str:
        """What it is called in params.yaml, studies and commands."""


T = TypeVar("T", bound=Named)
M = TypeVar("M", bound=Named)


_declared: dict[str, Mapping[str, object]] = {}  # by kind: what params.yaml and the profile describe, by name


def declare(kind: str, members: Mapping[str, object]) -> None:
    """Let members be known by what describes them, in place of those that were declared before."""
    _declared[kind] = members


class Registry(Generic[T]):
    """Components of one kind by name, and those that settings declare (`declare`), which `build` makes.

    At the first look-up the package that holds them is imported, then what other packages offer: each entry point of
    `group` names a module that registers its members when it is imported.

    Args:
        kind: what a member is called in messages ("method", "task", "backbone").
        package: dotted name of the package whose modules register members.
        group: of entry points, one of `GROUPS`.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._members: dict[str, T] = {}
        self._loaded = False
        self.build: Callable[[str, object], T] | None = None  # set by the module that can
        self.mixed: Callable[[Sequence[T]], T] | None = None  # likewise: of several one, which is called `a+b`

    def register(self, member: M) -> M:
        """File a member under its own name, which is given once, and return it: a call, or a class's decorator."""
        if member.name in self._members:
            raise RuntimeError(f"{self.kind} '{member.name}' is registered twice")
        self._members[member.name] = cast(T, member)
        return member

    def get(self, name: str) -> T:
        """Return the member called `name`.

        Raises:
            InputError: no such member; the message suggests the nearest name and lists all.
        """
        self._load()
        declared = _declared.get(self.kind, {})
        if name in declared:
            if name in self._members:
                raise InputError(
                    f"the project has a {self.kind} '{name}' already", where=f"{self.kind}s.{name}",
                    way_out="Give yours another name",
                )  # fmt: skip
            return self.made(name, declared[name])
        if (mixture := self._mixture(name, self.get)) is not None:
            return mixture
        require_known(self.kind, name, self.names())
        return self._members[name]

    def made(self, name: str, description: object) -> T:
        """Return the member that a description makes.

        Raises:
            InputError: the description does not fit, or members of this kind are not described.
        """
        self._load()
        known = description if isinstance(description, Mapping) else {}
        mixture = self._mixture(name, lambda part: self.made(part, known[part]) if known.get(part) else self.get(part))
        if mixture is not None:
            return mixture
        if self.build is None:
            raise InputError(f"a {self.kind} cannot be described by settings", where=name)
        return self.build(name, description)

    def _mixture(self, name: str, member: Callable[[str], T]) -> T | None:
        if self.mixed is None or "+" not in name or name in self._members:
            return None
        return self.mixed([member(part) for part in name.split("+")])

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._load()
        return sorted({*self._members, *_declared.get(self.kind, {})})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._members or name in _declared.get(self.kind, {})

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the imports: a component may look up another one
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for entry in _entry_points().select(group=self.group):
            try:
                entry.load()
            except Exception as error:
                self._loaded = False
                raise InputError(
                    f"its {self.kind} '{entry.name}' cannot be loaded: {type(error).__name__}: {error}",
                    where=_package_of(entry),
                    way_out="Mend that package, or uninstall it",
                ) from error


@functools.cache
def _entry_points() -> Any:
    return metadata.entry_points()  # reads every installed package: once for all registries


def _package_of(entry: metadata.EntryPoint) -> str:
    return f"package {entry.dist.name}" if entry.dist else entry.value


def extensions(entries: Collection[str] | None = None) -> dict[str, str]:
    """Return name and version of the packages that offer methods, backbones, tasks or measures.

    Args:
        entries: names of entry points, each called as what its module registers; None: all.
    """
    offered = (entry for group in GROUPS for entry in _entry_points().select(group=group))
    named = (entry for entry in offered if entries is None or entry.name in entries)
    return {entry.dist.name: entry.dist.version for entry in named if entry.dist}
