"""The only reader of params.yaml; its sections are in `pipeline.schema`.

`load()` returns `Params`; `Params.train` and the other sections are resolved against the profile that
`run:` points to. Unknown keys are refused with the nearest known one. What a number depends on is
`TrialConfig` (`pipeline.trial`); nothing downstream reads params.yaml again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.errors import InputError, nearest
from pipeline.plain_yaml import read
from pipeline.schema import (
    BackboneSource,
    Evaluate,
    Generation,
    Miniature,
    Params,
    Profile,
    Protocol,
    Retry,
    Scalar,
    Section,
    Study,
    StudyMethod,
    Subsample,
    Sweep,
    Tracking,
    Train,
)

__all__ = [
    "BackboneSource",
    "Evaluate",
    "Generation",
    "Miniature",
    "PARAMS",
    "Params",
    "Profile",
    "Protocol",
    "Retry",
    "Scalar",
    "Section",
    "Study",
    "StudyMethod",
    "Subsample",
    "Sweep",
    "Tracking",
    "Train",
    "data_root",
    "load",
    "validate",
]

PARAMS = "params.yaml"


def load(path: Path | str = PARAMS, overrides: list[str] | None = None) -> Params:
    """Read and validate params.yaml, with the profile's overrides laid over the sections.

    Args:
        path: the file.
        overrides: `key=value` strings, dotted keys, YAML values (`train.epochs=2`), as `--set` takes them.

    Raises:
        InputError: the file is missing, no YAML, or breaks the schema; the message names the field.
    """
    path = Path(path)
    try:
        raw = read(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), way_out="Run from the project's root") from None
    except UnicodeDecodeError as error:
        raise InputError(f"not readable as YAML: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise InputError("the file must hold a mapping", where=str(path))
    for item in overrides or []:
        _override(raw, item)
    params = validate(Params, raw, str(path))
    laid: dict[str, Any] = {}
    protocol = _protocol(params, str(path))
    for name in ("subsample", "train", "sweep", "evaluate"):
        merged = _merge(getattr(params, name).model_dump(), getattr(protocol, name, {}))
        merged = _merge(merged, getattr(params.run, name))
        laid[name] = validate(type(getattr(params, name)), merged, f"{path}: run.{name}")
    sources = {name: source.model_dump() for name, source in params.backbones.items()}
    for name, row in params.run.sources.items():
        sources[name] = _merge(sources.get(name, {}), row)
    laid["backbones"] = {
        name: validate(BackboneSource, row, f"{path}: run.sources.{name}") for name, row in sources.items()
    }
    studies = {name: study.model_dump() for name, study in params.studies.items()}
    for name, row in params.run.study_changes.items():
        if name not in studies:
            raise InputError(f"unknown study '{name}'", where="study_changes", way_out=nearest(name, studies))
        studies[name] = _merge(studies[name], row)
        laid["studies"] = {**params.studies, **laid.get("studies", {})}
        laid["studies"][name] = validate(Study, studies[name], f"{path}: run.study_changes.{name}")
    methods = {name: dict(row) for name, row in params.methods.items()}
    for name, row in params.run.methods.items():
        methods[name] = {**methods.get(name, {}), **row}
    return params.model_copy(update={**laid, "methods": methods})


def _protocol(params: Params, where: str) -> Protocol:
    if params.protocol is None:
        return Protocol()
    if params.protocol not in params.protocols:
        known = nearest(params.protocol, params.protocols)
        raise InputError(f"unknown protocol '{params.protocol}'", where=where, way_out=known)
    return params.protocols[params.protocol]


def data_root(params: Params) -> Path:
    """Return the folder of the official files (`run.data_root`, or HIFICL_DATA_ROOT where it is set)."""
    return Path(os.environ.get("HIFICL_DATA_ROOT", params.run.data_root))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError(f"'{item}' is not of the form key=value", where="--set", way_out="Write --set train.epochs=2")
    parts = key.split(".")
    # a section set on the command line must win over the profile's overrides of the same section
    if parts[0] in ("subsample", "train", "sweep", "evaluate", "methods"):
        parts = ["run", *parts]
    node = raw
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise InputError(f"'{part}' of '{key}' is no section", where="--set")
    node[parts[-1]] = read(text, f"--set {key}")


def validate(model: type[BaseModel], raw: Any, where: str) -> Any:
    """Return `raw` as a `model`.

    Raises:
        InputError: the first complaint, with the field's path below `where`.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _explain(model, error, where) from None


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> InputError:
    """Turn the first of pydantic's complaints into one line with a way out."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        return InputError(f"unknown key '{field}'", where=where, way_out=nearest(str(first["loc"][-1]), known))
    count = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return InputError(f"{field}: {first['msg']}, got {first.get('input')!r}{count}", where=where)


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section that `loc` leads to."""
    current: Any = model
    for part in loc:
        field = getattr(current, "model_fields", {}).get(part)
        annotation = field.annotation if field else current
        arguments = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        current = (
            annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel)
            else (arguments[0] if arguments else current)
        )
    return list(getattr(current, "model_fields", {}))
