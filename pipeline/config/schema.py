"""The sections of params.yaml, of a profile and of a study, typed; `pipeline.config.load` reads the files."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core.errors import validate

SOURCE_TASK = "source_task"  # of a study's `vary`: the task that a row is trained on, whichever it is scored on
Scalar = bool | int | float | str | None


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Whole = Literal["whole"]  # all of an official split


class Sizes(Section):
    """How many samples of one task are drawn, where that is not what all tasks have."""

    num_train: Annotated[int, Field(ge=1)] | None = None
    num_selection: Annotated[int, Field(ge=1)] | None = None
    num_evaluation: Annotated[int, Field(ge=1)] | Whole | None = None


class Subsample(Section):
    """Stage `subsample`: how many samples are drawn, and by which seed."""

    seed: int = 0
    num_train: int = Field(1000, ge=1)
    num_selection: int = Field(500, ge=1)
    num_evaluation: Annotated[int, Field(ge=1)] | Whole = "whole"
    tasks: dict[str, Sizes] = {}  # by task, where it is another number than for all
    training_answer: Literal["most-frequent", "first"] = "most-frequent"  # of a question's ten
    prompt: Literal["papers", "published"] = (
        "papers"  # whose wording; published: MimIC's code, where it knows the backbone
    )
    splits: dict[str, str] = {}  # how a task's data set is divided, where not as it was published: {coco: karpathy}

    def of(self, task: str) -> Subsample:
        """Return the same with the sizes of `task`."""
        of_task = self.tasks.get(task, Sizes()).model_dump(exclude_none=True)
        return self.model_copy(update=of_task)


class Train(Section):
    """Stage `train`: the papers' shared set-up (HiFICL Table 5, MimIC Table 7); methods may override."""

    num_train_samples: int = Field(1000, ge=1)
    sample_draw: Literal["first", "by-seed"] = "first"  # which samples of the training split, where not all
    num_selection_samples: int = Field(500, ge=1)
    num_shots: int = Field(8, ge=1)  # demonstrations in a teacher's prompt
    demonstration_draw: Literal["without-replacement", "with-replacement"] = "without-replacement"  # for a teacher
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
    quantize: Literal["none", "int8", "nf4"] = "none"  # how the frozen decoder's linear weights are stored
    engine: Literal["auto", "deepspeed", "torch"] = "auto"  # auto: DeepSpeed where there are several ranks or offload
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu"] = "none"
    world_size: int = Field(1, ge=1)
    compile: bool = False  # the decoder's norms and feed-forward nets by torch.compile
    deterministic: bool = False  # on a GPU: equal bits from equal inputs on the same kind of card, and slower
    gradient_checkpointing: bool = False  # a layer's activations are computed again in its backward pass, and not kept
    selection: Literal["selection", "test"] = "selection"
    selection_metric: Literal["score", "loss"] = "score"


class Generation(Section):
    """How text is generated for a score."""

    # published: as the published code of each method has it
    num_beams: Annotated[int, Field(ge=1)] | Literal["published"] = 1
    length_penalty: float | Literal["published"] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] | Literal["published"] | None = None  # None: the task's own
    batch_size: int = Field(16, ge=1)


class Evaluate(Section):
    """Stage `evaluate`."""

    num_evaluation_samples: int | None = Field(None, ge=1)
    generation: Generation = Generation()
    vqa_normalise: Literal["always", "official"] = "always"
    stem_predictions: bool = False  # where the task's references are stemmed (OK-VQA)
    drop_incomplete_batch: int | None = Field(None, ge=1)  # of a few-shot evaluation in batches of so many samples


class Retry(Section):
    """What is done with a trial whose worker dies."""

    max_attempts: int = Field(3, ge=1)
    hang_seconds: float = Field(1800, gt=0)  # no sign of life for so long: the worker is replaced


class EarlyExit(Section):
    """Who leaves a search before its end: at each point those whose training loss is not among the best."""

    after: tuple[Annotated[float, Field(gt=0)], ...] = ()  # in epochs, 0.5: within the first; none: nobody is compared
    keep: float = Field(0.5, gt=0, lt=1)  # what share of the trials that are compared goes on
    group: int = Field(8, ge=2)  # so many trials of a cell are compared with each other, at most

    @field_validator("after")
    @classmethod
    def _one_after_another(cls, after: tuple[float, ...]) -> tuple[float, ...]:
        if list(after) != sorted(set(after)):
            raise ValueError("each point has to lie behind the one before it")
        return after


class Sweep(Section):
    """How Ray Tune runs the trials."""

    search: Literal["grid", "random", "optuna"] = "grid"
    num_samples: int = Field(16, ge=1)  # trials a cell under random and optuna
    seed: int = 0
    warm_start: int = Field(0, ge=0)  # so many of Optuna's first points are those that were best in other searches
    scheduler: Literal["fifo", "asha", "median"] = "fifo"
    grace_epochs: int = Field(1, ge=1)
    reduction_factor: int = Field(3, ge=2)
    early_exit: EarlyExit = EarlyExit()
    slots: int | Literal["auto"] = "auto"  # pools of workers that train at the same time
    pack: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # most trials that share one forward pass in a slot
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)  # 0: workers see none
    threads_per_worker: int = Field(1, ge=1)

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_beyond_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("more than one GPU is a whole number of them")
        return gpus

    address: str | None = None  # None: a private cluster on this machine; "auto": the one that runs here
    retry: Retry = Retry()
    checkpoint_seconds: float = Field(600, ge=0)  # a trial's state is kept within an epoch so often; 0: at ends alone

    def slots_on(self, cpus: float, gpus: float, world_size: int = 1) -> int:
        """Return how many slots fit so much, which may be none, whatever number is asked for."""
        fit = cpus / (self.cpus_per_worker * world_size)
        if self.gpus_per_worker:
            fit = min(fit, gpus / (self.gpus_per_worker * world_size))
        return math.floor(fit + 1e-9)


class BackboneSource(Section):
    """Where a backbone's weights come from; with `hub` it is one that the project has no file for."""

    variant: Literal["published", "tiny"] = "published"
    weights: str | None = None  # a local folder; None: the hub's cache
    revision: str | None = None
    seed: int = 0  # of a tiny variant's random weights
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    hub: str | None = (
        None  # organisation/name, a folder in the hub's layout, or package:NAME, an installed one's folder
    )
    gguf: str | None = None  # a file of that folder, for a text decoder that transformers reads from GGUF
    chat: bool = True  # prompted in the turns of its chat template, where it has one; else with plain text

    @classmethod
    def spelled(cls, name: str) -> BackboneSource | None:
        """Return the source that a name spells out, or None.

        That is `hub:org/name`, `folder:PATH` or `package:NAME`, then `,key=value`.

        Raises:
            InputError: a key that there is not, or a value that does not fit.
        """
        kind, colon, rest = name.partition(":")
        if not colon or kind not in ("hub", "folder", "package"):
            return None
        place, *settings = rest.split(",")
        place = f"package:{place.strip()}" if kind == "package" else place
        pairs = dict(setting.partition("=")[::2] for setting in settings)
        return validate(
            cls, {"hub": place.strip(), **{key.strip(): value.strip() for key, value in pairs.items()}}, name
        )


ScoreName = Literal["exact", "vqa", "cider", "choice", "contains", "number"]


class TaskFields(Section):
    """Which columns of a file of one's own hold what; None: guessed by their names."""

    id: str | None = None  # "#": the row's number
    question: str | None = None
    answer: str | None = None  # or `answers`
    answers: str | None = None  # a list, or {answer: weight}
    image: str | list[str] | None = None  # a path or a list of paths; or several columns
    caption: str | None = None
    choices: str | list[str] | None = None  # a list of texts; or a column for each
    messages: str | None = None  # a chat, whose last turn is the answer
    group: str | None = None  # rows of one group stay in one split


class TaskSplit(Section):
    """Which values of a column make up which split."""

    column: str
    train: list[str] = Field(min_length=1)
    selection: list[str] = []  # none: drawn from the training rows
    evaluation: list[str] = Field(min_length=1)


class TaskChanges(Section):
    """What one of params.yaml and a profile says of a task over a file of the user's own; the other may say the rest.

    Attributes:
        file: JSON lines, JSON, CSV or Parquet, or a folder of those; below the profile's `data_root`.
        images: folder that image paths begin at, below `data_root`; None: the folder of the file that names them.
        prompt: the words around a sample, with `{image}` and names of fields or columns in braces.
        instruction: once before everything.
        split: a column's name, which values of it are which split, or `drawn`: by seed, no image or group in two.
        tolerance: for `number`, relative: how far a right answer may be from the reference.
        bad_rows: what is done with rows that cannot be used; those left out are counted and named in the manifest.
    """

    file: str | None = None
    images: str | None = None
    fields: TaskFields = TaskFields()
    prompt: str | None = None
    instruction: str | None = None
    score: ScoreName | None = None
    split: str | TaskSplit | None = None
    max_new_tokens: int | None = Field(None, ge=1)
    tolerance: float = Field(1e-6, ge=0)
    bad_rows: Literal["refuse", "leave-out"] = "refuse"


class TaskFile(TaskChanges):
    """A task over a file of the user's own (`pipeline.tasks.file_task`); what is left out is guessed from its rows."""

    file: str


class MiniatureSettings(Section):
    """Stages `backbone` and `world`: the backbones made here and the world they see."""

    seed: int = 0
    world_seed: int = 0
    num_train_images: int = Field(2500, ge=10)
    num_val_images: int = Field(2500, ge=10)
    difficulty: float | None = Field(None, ge=0, le=1)  # None: the world's own


class Tracking(Section):
    """MLflow."""

    uri: str | None = None  # None: mlflow.db beside params.yaml, or MLFLOW_TRACKING_URI
    artifacts: str | None = None  # None: mlartifacts beside params.yaml, or where a tracking server keeps them
    system_metrics: bool = True
    patience_seconds: float = Field(60, ge=0)  # how long the end of a sweep waits for a store that is away


class Protocol(Section):
    """Choices that move numbers, turned on together; laid over the sections of the same names, below the profile.

    What a paper's own scripts have beside that stands in `papers/settings.yaml`, with the protocol's name.
    """

    subsample: dict[str, Any] = {}
    train: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}


class Profile(Section):
    """What one `dvc repro` runs, and what it overrides in the sections of the same names."""

    backbones: list[str] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    studies: list[str] = Field(min_length=1)
    data_root: str = "data/real"
    world: Literal[1, 2, 3] = 1  # the miniature's, where it is made here (docs/miniature.md)
    sources: dict[str, dict[str, Any]] = {}  # over `backbones`: where weights come from
    subsample: dict[str, Any] = {}
    train: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    sweep: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}
    stand_ins: dict[str, list[str]] = {}  # whose parts a backbone or a task plays beside its own, the first one asked
    study_changes: dict[str, dict[str, Any]] = {}  # over `studies`: what this profile cannot do as printed
    task_files: dict[str, TaskChanges] = {}  # where `tasks` is a mapping: what it says of those over own files

    @model_validator(mode="before")
    @classmethod
    def _described_tasks(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("tasks"), dict):
            described = {name: task for name, task in data["tasks"].items() if task is not None}
            data = {**data, "tasks": list(data["tasks"]), "task_files": described}
        return data


class StudyMethod(Section):
    """One row of a study: a method, its fixed settings, and what is searched for it."""

    method: str
    label: str | None = None
    paper: str | None = None  # the row's name in the paper's table, where two rows share one
    backbones: list[str] = []  # the papers' backbones and tasks that the row is for; empty: all of the study's
    tasks: list[str] = []
    set: dict[str, Any] = {}
    search: dict[str, Any] = {}
    source_task: str | None = None  # what the row is trained on, whichever task it is scored on; `a+b`: a mixture
    trial: TrialConfig | None = None  # a recorded trial as it stands, which no setting reaches, and how it is scored
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="after")
    def _whole_trial(self) -> StudyMethod:
        if self.trial is not None and (self.set or self.search or self.method != self.trial.method):
            raise ValueError("a row that holds a recorded trial has its method, and neither settings nor a search")
        return self


class Budget(Section):
    """As many trials for every row that trains, each over a space of its own, chosen on the selection split."""

    trials: int = Field(ge=1)
    spaces: dict[str, dict[str, Any]] = {}  # by method, for its rows without a `search` of their own
    widen: int = Field(0, ge=0)  # how many steps a space grows by where the best point lies at an end of it


class Study(Section):
    """A table or a figure of the papers: which trials, how they are laid out, what was printed."""

    title: str
    paper: str | None = None  # dotted path into the papers' figures, such as hificl.table1_main
    layout: Literal["table", "curve", "bars", "pareto", "gallery"] = "table"
    backbones: list[str] = Field(min_length=1)  # the papers' names; the profile says what stands for them
    tasks: list[str] = Field(min_length=1)
    methods: dict[str, StudyMethod] = Field(min_length=1)
    vary: dict[str, list[Any]] = {}  # every value is a point of the report; `source_task`: tasks to train on, or `a+b`
    seeds: list[int] = Field([0], min_length=1)
    budget: Budget | None = None
    train: dict[str, Any] = {}
    metrics: list[str] = []  # further metrics of a cell beside its task's own
    measure: str = "score"  # what a cell's number is; see pipeline/measure
    measured: dict[str, Any] = {}  # the measure's own settings
    reference: str | None = None  # the row that others are compared with; None: the paper's own method
    # the least difference that a claim is about, by task (the paper's name) or further metric, in the table's unit
    smallest_effect: dict[str, Annotated[float, Field(ge=0)]] = {}
    note: str | None = None  # shown above the table
    # rows that a profile cannot run, each with its reason, which the report says; null: it can, unlike what it extends
    without: dict[str, str | None] = {}

    def notes(self) -> str | None:
        """Return the note, with the rows that are left out."""
        left = "; ".join(f"{self.methods[row].label or row} ({why})" for row, why in self.without.items() if why)
        return " ".join(filter(None, [self.note, f"Left out here: {left}." if left else None])) or None

    @property
    def source_tasks(self) -> list[str]:
        """What rows are trained on, where it is not the task that they are scored on, by the papers' names."""
        of_rows = [row.source_task for row in self.methods.values() if row.source_task]
        return [*map(str, self.vary.get(SOURCE_TASK, [])), *of_rows]

    @model_validator(mode="after")
    def _known_rows(self) -> Study:
        for row in self.without:
            if row not in self.methods:
                raise ValueError(f"without names '{row}', which is no row; the rows are {', '.join(self.methods)}")
        for source in self.source_tasks:
            for name in source.split("+"):
                if name not in self.tasks:
                    raise ValueError(f"{SOURCE_TASK} names '{name}', which is none of the study's tasks")
        if self.source_tasks and self.measure != "score":
            raise ValueError(f"{SOURCE_TASK} goes with scores alone, not with the measure {self.measure}")
        for name in self.smallest_effect:
            if name not in (*self.tasks, *self.metrics):
                known = ", ".join((*self.tasks, *self.metrics))
                raise ValueError(
                    f"smallest_effect names '{name}', which is no task or metric of the study; it has {known}"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _short_rows(cls, data: Any) -> Any:
        # `lora-r16: {method: lora, rank: 16}` is the short form of `{method: lora, set: {rank: 16}}`
        if isinstance(data, dict) and isinstance(data.get("methods"), dict):
            row_fields = set(StudyMethod.model_fields)
            budget = data.get("budget")
            spaces = (budget.get("spaces") if isinstance(budget, dict) else None) or {}
            rows = {}
            for name, given in data["methods"].items():
                row = {"method": name} if given is None else dict(given)
                row.setdefault("method", name)
                extra = {k: row.pop(k) for k in list(row) if k not in row_fields}
                row["set"] = {**row.get("set", {}), **extra}
                if row["method"] in spaces and not row.get("search"):
                    row["search"] = spaces[row["method"]]
                rows[name] = row
            data = {**data, "methods": rows}
        return data


class Sources(Section):
    """Where every backbone's weights come from, by name."""

    of: dict[str, BackboneSource]


class TaskFiles(Section):
    """Every task over a file of the user's own, by name."""

    tasks: dict[str, TaskFile]


class ParamsFile(Section):
    """params.yaml as a user writes it, with the profiles and studies beside it."""

    profile: str | None = None
    run: Profile | None = None  # a whole profile instead of a name
    profiles: dict[str, dict[str, Any]]
    studies: dict[str, Study]
    protocol: str | None = None
    protocols: dict[str, Protocol] = {}
    subsample: Subsample = Subsample()
    train: Train = Train()
    methods: dict[str, dict[str, Any]] = {}
    sweep: Sweep = Sweep()
    evaluate: Evaluate = Evaluate()
    backbones: dict[str, BackboneSource] = {}
    tasks: dict[str, TaskChanges] = {}
    miniature: MiniatureSettings = MiniatureSettings()
    tracking: Tracking = Tracking()


class Explicit(Section):
    """What the user set in params.yaml or by `--set`; wins over profile, paper, method and study."""

    subsample: dict[str, Any] = {}
    train: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    sweep: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}


class Params(Section):
    """params.yaml with the profiles and studies beside it, every section resolved."""

    profile: str
    run: Profile  # the profile of that name
    explicit: Explicit = Explicit()
    profiles: dict[str, dict[str, Any]]
    protocols: dict[str, Protocol] = {}
    protocol: str | None = None  # one of `protocols`; None: every choice as its own section has it
    miniature: MiniatureSettings = MiniatureSettings()
    backbones: dict[str, BackboneSource] = {}
    task_files: dict[str, TaskFile] = {}
    subsample: Subsample = Subsample()
    train: Train = Train()
    sweep: Sweep = Sweep()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    studies: dict[str, Study]

    def backbone_source(self, name: str) -> BackboneSource:
        """Return where the weights of `name` come from."""
        return self.backbones.get(name) or BackboneSource.spelled(name) or BackboneSource()
