"""The typed schema of params.yaml, and its only reader.

`load()` returns `Params`; `Params.train` and the other sections are resolved against the profile that
`run:` points to. Unknown keys are refused with the nearest known one. What a number depends on is
`TrialConfig` (`pipeline.trial`); nothing downstream reads params.yaml again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import InputError, nearest

PARAMS = "params.yaml"
Scalar = bool | int | float | str | None


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Subsample(Section):
    """Stage `subsample`: how many samples are drawn, and by which seed."""

    seed: int = 0
    num_train: int = Field(1000, ge=1)
    num_selection: int = Field(500, ge=1)
    num_evaluation: int | None = Field(None, ge=1)  # None: the whole official split


class Train(Section):
    """Stage `train`: the papers' shared set-up (HiFICL Table 5, MimIC Table 7); methods may override."""

    num_train_samples: int = Field(1000, ge=1)
    num_selection_samples: int = Field(500, ge=1)
    num_shots: int = Field(8, ge=1)  # demonstrations in a teacher's prompt
    epochs: int = Field(5, ge=1)
    epochs_below_1000: int = Field(10, ge=1)
    learning_rate: float = Field(5e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    gradient_clip: float = Field(1.0, gt=0)
    micro_batch_size: int = Field(2, ge=1)  # samples a rank sees at once
    accumulation: int = Field(2, ge=1)
    loss_span: Literal["answer", "sequence"] = "answer"
    alignment_weight: float | None = Field(None, ge=0)  # of the teacher's loss; None: the method's own
    ground_truth_weight: float | None = Field(None, ge=0)  # of the cross-entropy; None: the method's own
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu"] = "none"
    world_size: int = Field(1, ge=1)
    selection: Literal["selection", "test"] = "selection"
    selection_metric: Literal["score", "loss"] = "score"


class Generation(Section):
    """How text is generated for a score."""

    num_beams: int = Field(1, ge=1)
    length_penalty: float = 1.0
    max_new_tokens: int | None = Field(None, ge=1)  # None: the task's own
    batch_size: int = Field(16, ge=1)


class Evaluate(Section):
    """Stage `evaluate`."""

    num_evaluation_samples: int | None = Field(None, ge=1)
    generation: Generation = Generation()
    vqa_normalise: Literal["always", "official"] = "always"


class Retry(Section):
    """What is done with a trial whose worker dies."""

    max_attempts: int = Field(3, ge=1)
    hang_seconds: float = Field(1800, gt=0)  # no sign of life for so long: the worker is replaced


class Sweep(Section):
    """How Ray Tune runs the trials."""

    search: Literal["grid", "random", "optuna"] = "grid"
    num_samples: int = Field(16, ge=1)  # trials a cell under random and optuna
    seed: int = 0
    scheduler: Literal["fifo", "asha", "median"] = "fifo"
    grace_epochs: int = Field(1, ge=1)
    reduction_factor: int = Field(3, ge=2)
    slots: int | Literal["auto"] = "auto"  # pools of workers that train at the same time
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    threads_per_worker: int = Field(1, ge=1)
    address: str | None = None  # None: a private cluster on this machine; "auto": the one that runs here
    retry: Retry = Retry()


class BackboneSource(Section):
    """Where a backbone's weights come from."""

    variant: Literal["published", "tiny"] = "published"
    weights: str | None = None  # a local folder; None: the hub's cache
    revision: str | None = None
    seed: int = 0  # of a tiny variant's random weights
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


class Miniature(Section):
    """Stages `backbone` and `world`: the backbones made here and the world they see."""

    seed: int = 0
    world_seed: int = 0
    num_train_images: int = Field(2500, ge=10)
    num_val_images: int = Field(2500, ge=10)
    difficulty: float = Field(0.2, ge=0, le=1)


class Tracking(Section):
    """MLflow."""

    uri: str | None = None  # None: mlflow.db beside params.yaml, or MLFLOW_TRACKING_URI
    system_metrics: bool = True


class Profile(Section):
    """What one `dvc repro` runs, and what it overrides in the sections of the same names."""

    backbones: list[str] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    studies: list[str] = Field(min_length=1)
    data_root: str
    sources: dict[str, dict[str, Any]] = {}  # over `backbones`: where weights come from
    subsample: dict[str, Any] = {}
    train: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    sweep: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}


class StudyMethod(Section):
    """One row of a study: a method, its fixed settings, and what is searched for it."""

    method: str
    label: str | None = None
    set: dict[str, Any] = {}
    search: dict[str, Any] = {}


class Study(Section):
    """A table or a figure of the papers: which trials, how they are laid out, what was printed."""

    title: str
    paper: str | None = None  # dotted path into the papers' figures, such as hificl.table1_main
    layout: Literal["table", "curve", "bars", "gallery"] = "table"
    backbones: list[str] = Field(min_length=1)  # the papers' names; the profile says what stands for them
    tasks: list[str] = Field(min_length=1)
    methods: dict[str, StudyMethod] = Field(min_length=1)
    vary: dict[str, list[Any]] = {}  # every value is a point of the report
    seeds: list[int] = Field([0], min_length=1)
    train: dict[str, Any] = {}
    metrics: list[str] = []  # further metrics of a cell beside its task's own

    @model_validator(mode="before")
    @classmethod
    def _short_rows(cls, data: Any) -> Any:
        # `lora-r16: {method: lora, rank: 16}` is the short form of `{method: lora, set: {rank: 16}}`
        if isinstance(data, dict) and isinstance(data.get("methods"), dict):
            own = set(StudyMethod.model_fields)
            rows = {}
            for name, given in data["methods"].items():
                row = {"method": name} if given is None else dict(given)
                row.setdefault("method", name)
                extra = {k: row.pop(k) for k in list(row) if k not in own}
                row["set"] = {**row.get("set", {}), **extra}
                rows[name] = row
            data = {**data, "methods": rows}
        return data


class Params(Section):
    """The whole file."""

    profiles: dict[str, Profile]
    run: Profile
    miniature: Miniature = Miniature()
    backbones: dict[str, BackboneSource] = {}
    subsample: Subsample = Subsample()
    train: Train = Train()
    methods: dict[str, dict[str, Any]] = {}
    sweep: Sweep = Sweep()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    studies: dict[str, Study]

    @property
    def profile(self) -> str:
        """Name of the profile that `run:` points to ('custom' when it equals none)."""
        return next((name for name, profile in self.profiles.items() if profile == self.run), "custom")

    def backbone_source(self, name: str) -> BackboneSource:
        """Return where the weights of `name` come from."""
        return self.backbones.get(name, BackboneSource())


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
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), way_out="Run from the project's root") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not readable as YAML: {error}", where=str(path)) from None
    if not isinstance(raw, dict):
        raise InputError("the file must hold a mapping", where=str(path))
    for item in overrides or []:
        _override(raw, item)
    params = validate(Params, raw, str(path))
    laid = {}
    for name in ("subsample", "train", "sweep", "evaluate"):
        merged = _merge(getattr(params, name).model_dump(), getattr(params.run, name))
        laid[name] = validate(type(getattr(params, name)), merged, f"{path}: run.{name}")
    sources = {name: source.model_dump() for name, source in params.backbones.items()}
    for name, row in params.run.sources.items():
        sources[name] = _merge(sources.get(name, {}), row)
    laid["backbones"] = {
        name: validate(BackboneSource, row, f"{path}: run.sources.{name}") for name, row in sources.items()
    }
    methods = {name: dict(row) for name, row in params.methods.items()}
    for name, row in params.run.methods.items():
        methods[name] = {**methods.get(name, {}), **row}
    return params.model_copy(update={**laid, "methods": methods})


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
    node[parts[-1]] = yaml.safe_load(text)


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
