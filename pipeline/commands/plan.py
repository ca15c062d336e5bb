"""Before anything runs: what can be named (`hificl methods`, `backbones`, `tasks`), `trials`, `plan` and `params`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.parser import CommandLine, profile_name, settable, study_names
from pipeline.core.errors import InputError
from pipeline.core.terminal import Answer, Fields, Rows, short, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from pipeline.core.plain_yaml import Json
    from pipeline.cost.hours import Rates
    from pipeline.plan.plan import TrialRow
    from pipeline.train.counting import BackboneMemory, StepMemory

REAL = "real"
_SHOWN = (
    "task", "backbone", "num_train_samples", "num_shots", "epochs", "learning_rate", "weight_decay", "precision",
    "seed", "num_evaluation",
)  # fmt: skip


def register(line: CommandLine) -> None:
    """Add the verbs."""
    parser = line.verb(
        "check", "plan", _plan, "the GPU-hours, or the memory, of a study's real backbones", answers=True
    )
    study_names(parser.add_argument("--study", help="needed for the hours (default: the profile's studies)"))
    parser.add_argument("--memory", action="store_true", help="what fits which card, instead of the hours")
    parser.add_argument(
        "--card", type=int, action="append", metavar="GIB", help="a card's memory (default: 24, 48, 80)"
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of peak that is reached (default: 0.4)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 (default: an H100's 989)")
    parser.add_argument("--bandwidth-tb", type=float, default=3.35, help="memory, TB/s (default: an H100's 3.35)")
    profile_name(parser.add_argument("--profile", default=REAL))
    settable(parser)

    parser = line.verb("look", "trials", _trials, "what would train: every setting, and where it is from", answers=True)
    study_names(parser.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)"))
    profile_name(parser.add_argument("--profile", metavar="P", help="a profile (default: params.yaml's)"))
    settable(parser)

    parser = line.verb("check", "params", _params, "a method's trainable parameters on a real backbone", answers=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--method", required=True)
    settable(parser)

    text = "what adapts a model: every method and its options"
    line.verb("names", "methods", _of_methods, text, answers=True)
    text = "what is adapted: backbones, and classes of any checkpoint"
    line.verb("names", "backbones", _of_backbones, text, answers=True)
    text = "what is asked: every task and its score"
    line.verb("names", "tasks", _of_tasks, text, answers=True)

    parser = line.verb("names", "completion", _completion, 'complete words: eval "$(hificl completion bash)"')
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def _plan(args: argparse.Namespace) -> Answer:
    """Return the forecast of the command line."""
    from pipeline.cost.hours import Rates

    if args.memory:
        return study_memory(args.study, cards=args.card, profile=args.profile, overrides=args.set)
    if args.study is None:
        raise InputError("whose hours?", where="--study", way_out="Give --study NAME; `hificl studies` lists them")
    rates = Rates(args.peak_tflops, args.bandwidth_tb, args.utilisation)
    return Fields(study_hours(args.study, gpus=args.gpus, rates=rates, profile=args.profile, overrides=args.set))


def study_hours(
    study: str, *, gpus: int, rates: Rates, profile: str = REAL, overrides: list[str] | None = None
) -> Json:
    """Return the GPU-hours of a study on the real backbones.

    Args:
        study: its name.
        gpus: over which trials are spread.
        rates: of a GPU; the profile says how many prompts are decoded together.
        profile: whose settings count.
        overrides: as `--set` takes them.

    Raises:
        InputError: unknown study or profile, or fewer than one GPU.
    """
    from pipeline.config.load import load
    from pipeline.cost import hours
    from pipeline.cost.flops import Prompt
    from pipeline.plan.plan import drawn_samples, evaluated_samples, planned_trials
    from pipeline.plan.space import mixtures

    if gpus < 1:
        raise InputError(f"at least one GPU is needed, got {gpus}", where="--gpus")
    if not 0 < rates.utilisation <= 1:
        raise InputError(f"a share between 0 and 1 is needed, got {rates.utilisation}", where="--utilisation")
    params = load(overrides=overrides or [], profile=profile)
    rates = replace(rates, batch_size=params.evaluate.generation.batch_size)
    planned = planned_trials(params, study)
    evaluated = {task: evaluated_samples(params, task) for task in params.run.tasks}
    images = {task: drawn_samples(params, task) + count for task, count in evaluated.items()}
    for mixture in mixtures(params, study):  # scored on each of its tasks, whose evaluation's images are counted there
        evaluated[mixture] = sum(evaluated[task] for task in mixture.split("+"))
        images[mixture] = drawn_samples(params, mixture)
    prompt = Prompt()
    result = hours.forecast(planned, evaluated=evaluated, images=images, rates=rates, prompt=prompt)
    total, plain = result.total, asdict(result)
    return {
        "study": study, "profile": profile, "gpus": gpus, "gpu_hours": total, "wall_hours": total / gpus,
        "gpu_hours_with_shared_teacher": total - result.teacher_saved, "trials": result.trials,
        "gpu_hours_by_part": plain["hours"], "gpu_hours_by_method": plain["by_method"],
        "not_counted": plain["not_counted"],
        "assumed": {
            **asdict(rates), **asdict(prompt), "evaluation_samples": {**evaluated}, "images_a_task": {**images},
            "picture": "480 x 640 pixels where a backbone keeps a picture's size",
        },
        "method": "FLOPs counted by the formulas of pipeline/cost from the real configurations; "
        "hours = FLOPs / (peak x utilisation), decoding = weights read / (bandwidth x utilisation). No GPU was asked.",
    }  # fmt: skip


def study_memory(
    study: str | None, *, cards: Sequence[int] | None = None, profile: str = REAL, overrides: list[str] | None = None
) -> MemoryPlan:
    """Return what a study's trials take of a card, and what fits.

    Args:
        study: its name; None: the profile's studies, all together.
        cards: GiB of each; None: those that there are.
        profile: whose settings count.
        overrides: as `--set` takes them.

    Raises:
        InputError: unknown study or profile, or a card without memory.
    """
    from pipeline.config.load import load
    from pipeline.plan.plan import planned_trials
    from pipeline.train.counting import CARDS, memory_of

    for card in cards or ():
        if card < 1:
            raise InputError(f"a card of {card} GiB holds nothing", where="--card", way_out="Give its GiB: --card 24")
    params = load(overrides=overrides or [], profile=profile)
    studies = tuple(params.run.studies if study is None else [study])
    counted, left_out = memory_of(trial for name in studies for trial in planned_trials(params, name))
    return MemoryPlan(studies, profile, tuple(cards or CARDS), counted, left_out)


@dataclass(frozen=True)
class MemoryPlan(Answer):
    """What trials take of a card, by backbone, and what fits cards of so many GiB."""

    studies: tuple[str, ...]
    profile: str
    cards: tuple[int, ...]
    backbones: list[BackboneMemory]
    not_counted: dict[str, str]

    def record(self) -> Json:
        """Return GiB by method, and by card how many trials train together and questions are answered at once."""
        from pipeline.train.counting import GIB

        def of_step(backbone: BackboneMemory, step: StepMemory) -> Json:
            sizes = {f"{name}_gib": getattr(step, name) / GIB for name in ("step", "checkpointed", "teacher")}
            fit = {
                str(card): {"trials": step.trials(room), "checkpointed": step.trials(room, again=True)}
                for card in self.cards
                for room in [backbone.room(card)]
            }
            return {"method": step.method, "micro_batch_size": step.rows, **sizes, "cards": fit}

        return {
            "studies": list(self.studies), "profile": self.profile, "not_counted": {**self.not_counted},
            "backbones": [
                {
                    "backbone": of.backbone, "precision": of.precision, "quantize": of.quantize,
                    "weights_gib": of.weights / GIB,
                    "methods": [of_step(of, step) for step in of.steps],
                    "rows_answered_at_once": {
                        str(card): {f"{shots} shots": of.rows(card, shots) for shots in of.answers}
                        for card in self.cards
                    },
                }
                for of in self.backbones
            ],
            "method": "storages of meta tensors counted while they live, at two depths, drawn out. No GPU was asked.",
        }  # fmt: skip

    def shown(self) -> Iterator[RenderableType]:
        """Give a row a method, and one a number of demonstrations that questions are answered behind."""
        from pipeline.train.counting import GIB

        for of in self.backbones:
            yield f"{of.backbone} {of.stored}: {of.weights / GIB:.1f} GiB of weights; in GiB beside them:\n"
            cards = [f"{card} GiB" for card in self.cards]
            made = table("method", "step", "checkpointed", "teacher", *cards, right=("step", "checkpointed", "teacher"))
            for step in of.steps:
                sizes = [f"{size / GIB:.1f}" if size else "" for size in (step.step, step.checkpointed, step.teacher)]
                made.add_row(
                    f"{step.method}, {step.rows} rows", *sizes, *(_fits(of, step, card) for card in self.cards)
                )
            for shots in of.answers:
                rows = [of.rows(card, shots) for card in self.cards]
                made.add_row(f"answers, {shots}-shot", "", "", "", *(str(n or "no") for n in rows))
            yield made
            yield ""
        yield "By card: trials of a method that train together (c.: with train.gradient_checkpointing), and questions"
        yield "that are answered at once behind so many demonstrations."
        yield from (f"{name} is not counted: {why}" for name, why in self.not_counted.items())


def _fits(of: BackboneMemory, step: StepMemory, card: int) -> str:
    """Return in words how a method trains on a card."""
    plain, again = (step.trials(of.room(card), again=again) for again in (False, True))
    if not plain:
        return f"{again} c." if again else "no"
    return str(plain)


def _trials(args: argparse.Namespace) -> Trials:
    """Return the trials of some studies."""
    from pipeline.config.load import load
    from pipeline.plan.plan import places, trial_rows
    from pipeline.records.store import TrialStore

    params, folders = load(overrides=args.set, profile=args.profile), places()
    studies = args.study or params.run.studies
    return Trials(trial_rows(params, studies, folders, TrialStore(folders.runs).finished))


@dataclass(frozen=True)
class Trials(Answer):
    """The trials of some studies."""

    rows: list[TrialRow]

    def record(self) -> list[Json]:
        """Return a record a trial."""
        return [row.record() for row in self.rows]

    def shown(self) -> Iterator[RenderableType]:
        """Give each study's trials by what differs between them, and below every setting and where it comes from."""
        for study in dict.fromkeys(row.study for row in self.rows):
            rows = [row for row in self.rows if row.study == study]
            yield f"{study}: {len(rows)} trials, {sum(row.done for row in rows)} done\n"
            yield _by_trial(rows)
            yield ""
            yield _by_setting(rows)
            yield ""


def _by_trial(rows: Sequence[TrialRow]) -> Table:
    """Return a row a trial, with the settings that are not the same in all that have them."""
    facts, options = [_settings(row) for row in rows], [_options(row) for row in rows]
    differ, own_options = _differing(facts), _differing(options)
    heads = [name.replace("_", "\n") for name in differ]  # narrow as the numbers below them
    made = table("row", *heads, *(["options"] if own_options else []), "done", right=heads[differ.count("task") :])
    for row, fact, option in zip(rows, facts, options, strict=True):
        shown = " ".join(f"{name}={option[name]}" for name in own_options if name in option)
        cells = [*(fact[name] for name in differ), *([shown] if own_options else [])]
        made.add_row(row.row, *cells, "yes" if row.done else "")
    return made


def _by_setting(rows: Sequence[TrialRow]) -> Table:
    """Return a row a setting: its values, and where they come from."""
    facts = [{**_settings(row), **_options(row)} for row in rows]
    made = table("setting", "value", "from")
    for name in dict.fromkeys(name for fact in facts for name in fact):
        having = [(row, fact[name]) for row, fact in zip(rows, facts, strict=True) if name in fact]
        values = dict.fromkeys(value for _, value in having)
        sources = dict.fromkeys(row.sources[name] for row, _ in having if name in row.sources)
        made.add_row(name, ", ".join(values), ", ".join(sources) or "the study and the profile")
    return made


def _differing(facts: Sequence[Mapping[str, str]]) -> list[str]:
    names = dict.fromkeys(name for fact in facts for name in fact)
    return [name for name in names if len({fact[name] for fact in facts if name in fact}) > 1]


def _settings(row: TrialRow) -> dict[str, str]:
    """Return what all methods have, as a table shows it."""
    record = row.record()
    return {name: short(record[name]) for name in _SHOWN}


def _options(row: TrialRow) -> dict[str, str]:
    """Return the method's own options."""
    return {name: short(value) for name, value in row.trial.options.items() if not isinstance(value, dict | list)}


def _params(args: argparse.Namespace) -> ParameterCount:
    """Count what the command line names."""
    return count(args.backbone, args.method, args.set)


@dataclass(frozen=True)
class ParameterCount(Answer):
    """The parameters that a method trains, in all and by module."""

    backbone: str
    method: str
    options: Json
    trainable: int
    modules: dict[str, int]

    def record(self) -> Json:
        """Return the fields."""
        return asdict(self)

    def shown(self) -> Iterator[RenderableType]:
        """Give the sum, and a row for the modules that have one name but for the layer's number."""
        yield f"{self.method} on {self.backbone}: {self.trainable:,} trainable parameters"
        yield f"options: {short(self.options)}\n"
        alike: dict[str, list[int]] = {}
        for name, size in self.modules.items():
            alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(size)
        rows = table("module", "how many", "parameters", right=("how many", "parameters"))
        for name, sizes in alike.items():
            rows.add_row(name, str(len(sizes)), f"{sum(sizes):,}")
        yield rows


def count(backbone: str, method: str, settings: list[str]) -> ParameterCount:
    """Return what a method trains on a backbone's real configuration.

    Args:
        backbone: a registered backbone.
        method: a method that trains.
        settings: its options as `key=value`.

    Raises:
        InputError: unknown backbone, method or option.
    """
    from pipeline import adapters, backbones
    from pipeline.core.plain_yaml import read

    options = {}
    for item in settings:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"'{item}' is not of the form key=value", where="--set", way_out="Write --set rank=8")
        options[key] = read(text, f"--set {key}")
    checked = adapters.options_of(method).checked(options, method)
    model = backbones.load(backbone, variant="meta").model
    adapter = adapters.make(method, model, checked)
    return ParameterCount(backbone, method, checked.plain(), adapter.num_trainable(), adapter.modules_trainable())


def _of_methods(_: argparse.Namespace) -> Rows:
    """Return every method, with its options and their defaults."""
    from pipeline import methods

    rows = [
        {
            "name": name, "trained": methods.is_trained(name), "what": methods.summary(name),
            "options": methods.parse(name, {}).plain(),
        }
        for name in methods.names()
    ]  # fmt: skip
    return Rows(rows, {"name": "method", "trained": "trained", "what": "what it does", "options": "options"})


def _of_backbones(_: argparse.Namespace) -> Rows:
    """Return every backbone with its class and checkpoint, then the classes of which any checkpoint can be named."""
    from pipeline import backbones
    from pipeline.backbones.families.generic import architectures

    members = map(backbones.get, backbones.names())
    rows = [
        {
            "name": member.name, "class": member.family.model_name, "parameters": member.parameters,
            "checkpoint": member.hub_id, "stands_for": member.stands_for, "reads": "images", "status": "tested",
            "why": "here by name, with prompts of its own",
        }
        for member in members
    ]  # fmt: skip
    rows += [
        {
            "name": None, "class": row.model_class, "parameters": None, "checkpoint": None, "stands_for": None,
            "reads": row.reads, "status": row.status, "why": row.why, "model_type": row.model_type,
        }
        for row in architectures().values()
    ]  # fmt: skip
    heads = {"name": "backbone", "class": "class", "status": "status", "why": "why"}
    return Rows(rows, heads)


def _of_tasks(_: argparse.Namespace) -> Rows:
    """Return every task, with what it is scored by; those over files that settings here describe too."""
    from pipeline.config.load import PARAMS, load
    from pipeline.tasks import tasks

    if Path(PARAMS).is_file():
        load()
    members = map(tasks.get, tasks.names())
    rows = [
        {
            "name": member.name, "metric": member.metric, "unit": member.unit, "question": member.template.asks,
            "stands_for": member.stands_for if member.stands_for != member.name else None,
        }
        for member in members
    ]  # fmt: skip
    heads = {"name": "task", "metric": "metric", "unit": "unit", "question": "question", "stands_for": "stands for"}
    return Rows(rows, heads)


def _completion(args: argparse.Namespace) -> None:
    """Print the shell's code."""
    import argcomplete

    print(argcomplete.shellcode(["hificl"], shell=args.shell))
