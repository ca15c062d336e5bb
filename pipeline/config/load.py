"""The only reader of params.yaml, profiles/ and studies/; their sections are in `pipeline.config.schema`.

`load()` returns `Params`; `Params.train` and the other sections are resolved against the profile that `profile`
names. Unknown keys are refused with the nearest known one. What a number depends on is `TrialConfig`
(`pipeline.config.trial`); nothing downstream reads params.yaml again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import papers
from pipeline.config.schema import (
    BackboneSource,
    Evaluate,
    Explicit,
    Generation,
    MiniatureSettings,
    Params,
    ParamsFile,
    Profile,
    Protocol,
    Retry,
    Scalar,
    Section,
    Sizes,
    Sources,
    Study,
    StudyMethod,
    Subsample,
    Sweep,
    TaskFiles,
    Tracking,
    Train,
)
from pipeline.config.trial import Kind, TrialConfig
from pipeline.core import registry
from pipeline.core.errors import InputError, nearest, require_known, validate
from pipeline.core.plain_yaml import Json, read

__all__ = [
    "BackboneSource",
    "Evaluate",
    "Explicit",
    "Generation",
    "MiniatureSettings",
    "PARAMS",
    "Params",
    "Profile",
    "Protocol",
    "Requests",
    "Retry",
    "Scalar",
    "Section",
    "Sizes",
    "Study",
    "StudyMethod",
    "Subsample",
    "Sweep",
    "Tracking",
    "Train",
    "TrialRequest",
    "data_root",
    "load",
    "merge",
    "with_study",
]

PARAMS = "params.yaml"
SECTIONS = ("subsample", "train", "sweep", "evaluate")  # what a protocol and a profile may change
# what params.yaml sets; empty values set nothing
OWN = (*SECTIONS, "methods", "backbones", "tasks", "miniature", "tracking")
FOLDERS = {"profiles": "profiles", "studies": "studies"}  # beside params.yaml, a file an entry
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")  # of an address
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of a study or profile: it becomes a file's name and an address


def load(path: Path | str = PARAMS, overrides: Sequence[str] = (), profile: str | None = None) -> Params:
    """Read and validate params.yaml and the profiles and studies beside it.

    A section is laid over its defaults in this order: the protocol, the profile, what params.yaml sets, `overrides`.
    An empty value in params.yaml sets nothing. A file may also hold a whole profile under `run`, and profiles and
    studies of its own; its sections then lie below protocol and profile, as before there were files for each. Tasks
    over files of the user's own are known by their names from then on.

    Args:
        path: params.yaml.
        overrides: `key=value` strings, dotted keys, YAML values (`train.epochs=2`), as `--set` takes them.
        profile: instead of the one that the file names.

    Raises:
        InputError: a file is missing, no YAML, or breaks the schema; the message names the field.
    """
    path = Path(path)
    raw = _mapping(path)
    for section, folder in FOLDERS.items():
        files = {file.stem: _mapping(file) for file in sorted((path.parent / folder).glob("*.yaml"))}
        raw[section] = merge(files, _section(raw, section, str(path)))
    if profile is not None and "run" in raw:
        raw["run"] = _named(profile, _section(raw, "profiles", str(path)), str(path))
    elif profile is not None:
        raw["profile"] = profile
    for item in overrides:
        _override(raw, item)
    return _resolved(raw, str(path))


def with_study(params: Params, name: str, root: Path) -> Params:
    """Return parameters with a study as its file has it now; where there is none, they are as they were.

    Raises:
        InputError: as `load`.
    """
    path = root / FOLDERS["studies"] / f"{name}.yaml"
    if not path.exists():
        return params
    return params.model_copy(update={"studies": {**params.studies, name: validate(Study, _mapping(path), str(path))}})


def _resolved(raw: dict[str, Any], where: str) -> Params:
    for name in OWN:
        if name in raw:
            raw[name] = _set(_section(raw, name, where))
    file: ParamsFile = validate(ParamsFile, raw, where)
    if _PASSWORD.search(file.tracking.uri or ""):
        raise InputError(
            "tracking.uri: has a password in it, which would stand in the file's history and in every run's diff",
            where=where,
            way_out="Leave it out: MLflow reads ~/.mlflow/credentials, PostgreSQL ~/.pgpass (both mode 600)",
        )
    sections = {name: raw.get(name, {}) for name in OWN}
    for kind in FOLDERS:
        for name in raw[kind]:
            if not _NAME.fullmatch(str(name)):
                raise InputError(
                    f"'{name}' cannot be the name of one of the {kind}", where=where,
                    way_out="A name has letters (a-z), digits, '_', '-' and '.', and begins with a letter or digit",
                )  # fmt: skip
    protocols = {**papers.protocols(), **file.protocols}
    if file.protocol is not None:
        require_known("protocol", file.protocol, protocols, where)
    chosen = protocols[file.protocol] if file.protocol else Protocol()
    name, run, run_at = _profile(raw, sections, chosen, where)
    explicit = sections if file.run is None else dict.fromkeys(OWN, {})
    laid = {}
    for section in SECTIONS:
        merged = merge(merge(getattr(chosen, section, {}), getattr(run, section)), explicit[section])
        laid[section] = validate(type(getattr(file, section)), merged, f"{run_at}: {section}")
    of_profile = {task: changes.model_dump(exclude_unset=True) for task, changes in run.task_files.items()}
    task_files = validate(TaskFiles, {"tasks": merge(of_profile, sections["tasks"])}, run_at).tasks
    registry.declare("task", {task: (given, Path(run.data_root)) for task, given in task_files.items()})
    sources = validate(Sources, {"of": merge(run.sources, explicit["backbones"])}, f"{run_at}: sources").of
    registry.declare("backbone", {backbone: source for backbone, source in sources.items() if source.hub})
    return Params(
        profile=name, run=run, explicit=Explicit(**{name: explicit[name] for name in Explicit.model_fields}),
        task_files=task_files, profiles=raw["profiles"], studies=_studies(file.studies, run, run_at),
        protocols=protocols, protocol=file.protocol, miniature=file.miniature, tracking=file.tracking, **laid,
        backbones=sources,
    )  # fmt: skip


def _profile(raw: dict[str, Any], own: dict[str, Any], chosen: Protocol, where: str) -> tuple[str, Profile, str]:
    """Return name and content of the profile that is run, and where it stands."""
    profiles = raw["profiles"]
    if "run" in raw:
        if raw.get("profile") is not None:
            raise InputError("has both `profile` and `run`", where=where, way_out="Keep `profile: NAME`")
        run = raw["run"]
        if not isinstance(run, dict):
            raise InputError(f"run must hold a profile, got {run!r}", where=where, way_out="Write `profile: NAME`")
        name = next((name for name, profile in profiles.items() if profile == run), "custom")
        below = {section: merge(own[section], getattr(chosen, section, {})) for section in SECTIONS}
        below |= {"methods": own["methods"], "sources": own["backbones"]}
        return name, validate(Profile, merge(below, run), f"{where}: run"), f"{where}: run"
    name = raw.get("profile")
    if name is None:
        raise InputError("no profile is named", where=where, way_out=f"Write `profile: NAME`. {nearest('', profiles)}")
    at = f"profile '{name}'"
    return str(name), validate(Profile, _named(str(name), profiles, where), at), at


def _named(name: str, profiles: Json, where: str) -> Json:
    """Return a profile, complete."""
    require_known("profile", name, profiles, where)
    return _extended(name, profiles, ())


def _extended(name: str, profiles: Json, seen: tuple[str, ...]) -> Json:
    """Return a profile laid over the one that it extends."""
    profile = profiles[name]
    if not isinstance(profile, dict):
        raise InputError(f"must hold a mapping, got {profile!r}", where=f"profile '{name}'")
    base = profile.get("extends")
    if base is None:
        return profile
    if not isinstance(base, str) or base not in profiles or base in (*seen, name):
        problem = "extends itself" if base in (*seen, name) else f"extends unknown profile '{base}'"
        raise InputError(problem, where=f"profile '{name}'", way_out=nearest(str(base), set(profiles) - {name}))
    return merge(_extended(base, profiles, (*seen, name)), {k: v for k, v in profile.items() if k != "extends"})


def _studies(studies: dict[str, Study], run: Profile, run_at: str) -> dict[str, Study]:
    """Return every study in the order in which reports have them, with the profile's changes laid over it."""
    changed = {}
    for name, change in run.study_changes.items():
        require_known("study", name, studies, f"{run_at}: study_changes")
        changed[name] = validate(Study, merge(studies[name].model_dump(), change), f"{run_at}: study_changes.{name}")
    first = {name: place for place, name in enumerate(run.studies)}  # the profile's own, then the others as 1, 2, 10
    order = sorted(studies, key=lambda name: (first.get(name, len(first)), _natural(name)))
    return {name: changed.get(name, studies[name]) for name in order}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _mapping(path: Path) -> Json:
    """Read a file that must hold a mapping."""
    try:
        raw = read(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), way_out="Run from the project's root") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not readable as YAML: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise InputError("the file must hold a mapping", where=str(path))
    return raw


def _section(raw: Json, name: str, where: str) -> Json:
    section = raw.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise InputError(f"{name} must hold a mapping, got {section!r}", where=where)
    return section


def _set(section: Json) -> Json:
    """Return what a section sets: an empty value sets nothing."""
    values: Json = {key: _set(value) if isinstance(value, dict) else value for key, value in section.items()}
    return {key: value for key, value in values.items() if value is not None and value != {}}


def data_root(params: Params) -> Path:
    """Return the folder of the official files.

    Raises:
        InputError: the environment names another one, which DVC would not see.
    """
    if "HIFICL_DATA_ROOT" in os.environ:
        raise InputError(
            f"names {os.environ['HIFICL_DATA_ROOT']!r}, which DVC does not see", where="HIFICL_DATA_ROOT",
            way_out=f"Unset it, and make {params.run.data_root} that folder or a link to it",
        )  # fmt: skip
    return Path(params.run.data_root)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Json:
    """Return `over` laid over `base`, mapping by mapping."""
    out: Json = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return out


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError(f"'{item}' is not of the form key=value", where="--set", way_out="Write --set train.epochs=2")
    parts = key.split(".")
    if "run" in raw and parts[0] in (*SECTIONS, "methods"):  # where the profile stands in the file, it is set there
        parts = ["run", *parts]
    elif "run" not in raw and parts[0] == "run":  # the profile that is run
        parts = ["profiles", str(raw.get("profile")), *parts[1:]]
    node = raw
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise InputError(f"'{part}' of '{key}' is no section", where="--set")
    node[parts[-1]] = read(text, f"--set {key}")


@dataclass(frozen=True)
class TrialRequest:
    """What a slot is told of a trial: its configuration, and where things lie on this machine.

    Attributes:
        config: what decides the numbers.
        folder: the trial's folder in the store, absolute.
        manifest: path of the task's manifest, absolute.
        source: where the backbone's weights lie.
        cache: folder of the visual-token cache, absolute; None: memory only.
        pack_key: trials with the same key can share one forward pass; None: this one trains alone.
        teacher_key: trials with the same key have the same teacher's pass; None: it has no teacher.
        kinds: of targets that the sweep's trials with the same teacher's pass are compared with.
        keep_seconds: the state is kept within an epoch after so long; 0: only at its end.
        compared_after: points, in epochs, at which the trial stops to be compared with others of its search.
        manifest_digest: of the samples, where they are not those that the trial is trained on; None: they are.
    """

    config: TrialConfig
    folder: str
    manifest: str
    source: BackboneSource
    cache: str | None = None
    pack_key: str | None = None
    teacher_key: str | None = None
    kinds: tuple[Kind, ...] = ()
    keep_seconds: float = 0.0
    compared_after: tuple[float, ...] = ()
    manifest_digest: str | None = None

    @property
    def key(self) -> str:
        """The trial's key."""
        return self.config.key


class Requests:
    """A table of requests by trial key: what a plan knows, without the modules that made it."""

    def __init__(self, by_key: dict[str, TrialRequest]) -> None:
        self.by_key = by_key

    def __call__(self, tune_config: dict[str, Any]) -> TrialRequest:
        """Return the request of the trial that Tune calls `tune_config`."""
        return self.by_key[tune_config["trial"]]
