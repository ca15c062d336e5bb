"""Settings of the user's own that decide nothing, or not everywhere that they are meant to: a line for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline import methods
from pipeline.baselines import baselines
from pipeline.config.load import Params
from pipeline.core.errors import InputError
from pipeline.plan.plan import pack_key
from pipeline.plan.settings import EXPLICIT
from pipeline.plan.space import PAPERS_FULL_SIZE, TO_CHOOSE, Cell, corners, shares_nothing
from pipeline.tasks import tasks
from pipeline.tasks.choice_files import ChoiceTask
from pipeline.tasks.vqa import VqaTask

_OF_A_TEACHER = ("demonstration_draw", "alignment_weight")
_WITHOUT_TRAINING = ("num_train_samples", "precision", "quantize")


def unheard(params: Params, cells: Iterable[Cell]) -> list[str]:
    """Return a line for every setting in params.yaml or by `--set` that does not reach all that it is meant for."""
    cells = list(cells)
    sections = (_of_trials, _of_selection, _of_draw, _of_search, _of_evaluation)
    return [line for section in sections for line in section(params, cells)]


# -- train and methods -------------------------------------------------------------------------------------------------


def _of_trials(params: Params, cells: Sequence[Cell]) -> Iterator[str]:
    of_methods = [(f"methods.{method}", method, layer) for method, layer in params.explicit.methods.items()]
    for section, method, layer in (("train", None, params.explicit.train), *of_methods):
        for name, value in layer.items():
            said = f"{section}.{name}={value}"
            meant = [cell for cell in cells if method in (None, cell.method) and _uses(cell, name, layer)]
            if meant and name == "zero_stage" and value and all(map(_alone, meant)):
                yield f"{said} changes nothing here: every trial has one rank and no offload, and plain torch trains it"
            if not meant:
                yield f"{said} changes nothing here: no trial of these studies uses it"
            fields = [(cell, _field(cell, name)) for cell in meant]
            winners = Counter((cell.overruled[field], field) for cell, field in fields if field in cell.overruled)
            for (winner, field), count in winners.items():
                yield f"{said} does not reach {count} of {len(meant)} cells: {winner} sets {field}; change it there"


def _alone(cell: Cell) -> bool:
    train = cell.train
    return train.engine == "auto" and shares_nothing(train) and not {"world_size", "offload"} & cell.search.keys()


def _field(cell: Cell, name: str) -> str:
    """Return which setting decides in a cell: of the two numbers of epochs, the one for its number of samples."""
    few = cell.train.num_train_samples < PAPERS_FULL_SIZE
    return "epochs_below_1000" if name == "epochs" and few else name


def _uses(cell: Cell, name: str, layer: Mapping[str, Any]) -> bool:
    """Whether a setting of `train` or of the method decides anything in a cell."""
    if name in methods.option_names(cell.method):  # one that decides nothing beside the others is left out
        return name in cell.settings.options.plain()
    if name == "sample_draw":
        return cell.train.num_train_samples < cell.digests.train_sizes[cell.source_task]
    if name == "num_selection_samples" and cell.train.selection == "test":  # which takes the whole evaluation split
        return False
    if not methods.is_trained(cell.method):
        chooses = cell.settings.options.selects()
        return name in _WITHOUT_TRAINING or (chooses and name in TO_CHOOSE)
    if name == "epochs_below_1000":
        return cell.train.num_train_samples < PAPERS_FULL_SIZE
    if name == "epochs":  # beside another number for few samples it is for many alone
        return _field(cell, name) == name or "epochs_below_1000" not in layer
    facts = cell.settings.options.facts()
    if name == "num_shots":
        return facts.is_shown
    return name not in _OF_A_TEACHER or facts.teacher is not None


def _of_selection(params: Params, cells: Sequence[Cell]) -> Iterator[str]:
    """Say who asks for more to choose by than is drawn; that the user does, is an error (`Cell.trial`)."""
    name, sentences = "num_selection_samples", _Sentences()
    for cell in cells:
        asked, drawn = cell.train.num_selection_samples, cell.digests.selection_sizes.get(cell.source_task)
        by_others = cell.sources.get(name, EXPLICIT) != EXPLICIT and name not in {*cell.vary, *cell.search}
        if by_others and drawn is not None and asked > drawn and _uses(cell, name, {}):
            sentences.of(
                cell.source_task, f"{cell.sources[name]} sets {name}={asked}, {drawn} are drawn and all used: {{}}"
            )
    yield from sentences.lines()


# -- subsample ---------------------------------------------------------------------------------------------------------


def _of_draw(params: Params, cells: Sequence[Cell]) -> Iterator[str]:
    given, here, sentences = params.explicit.subsample, list(dict.fromkeys(cell.task for cell in cells)), _Sentences()
    for section in ("tasks", "splits"):
        for task in sorted(given.get(section, {}).keys() - set(here)):
            at = f"subsample.{section}.{task}={given[section][task]}"
            yield f"{at} changes nothing here: none of these studies asks for {task}"
    for name in ("num_train", "num_selection", "num_evaluation"):
        for task in here:
            size = getattr(params.subsample.tasks.get(task), name, None)
            asked = given.get("tasks", {}).get(task, {}).get(name)
            if name in given and size is not None and asked is None:
                at = f"subsample.tasks.{task}.{name}"
                said = f"subsample.{name}={given[name]} does not reach {{}}: profile {params.profile} sets {at}={size}"
                sentences.of(task, f"{said}; set that too")
            elif name in given or asked is not None:
                drawn = getattr(params.subsample.of(task), name)
                limit, used = _used(params, name, [cell for cell in cells if cell.task == task])
                if used is not None and drawn != "whole" and drawn > used:
                    sentences.of(task, f"of the {drawn} samples of subsample.{name}, {used} are used, by {limit}: {{}}")
    yield from sentences.lines()
    if given.get("training_answer") == "first" and all(isinstance(tasks.get(task), ChoiceTask) for task in here):
        yield "subsample.training_answer=first changes nothing here: a question of these tasks has one answer"


def _used(params: Params, name: str, cells: Sequence[Cell]) -> tuple[str, int | None]:
    """Return which setting says how many of the samples that are drawn of a task are used, and how many at most."""
    if name == "num_evaluation":
        return "evaluate.num_evaluation_samples", params.evaluate.num_evaluation_samples
    field = f"{name}_samples"
    having = [cell for cell in cells if field == "num_train_samples" or _uses(cell, field, {})]
    known = having and not any(field in cell.search for cell in having)
    return f"train.{field}", max(getattr(cell.train, field) for cell in having) if known else None


class _Sentences:
    """Lines that are said of several tasks, once with all their names."""

    def __init__(self) -> None:
        self._tasks: dict[str, dict[str, None]] = {}

    def of(self, task: str, line: str) -> None:
        """Say `line`, which has a {} for the tasks, of `task`."""
        self._tasks.setdefault(line, {})[task] = None

    def lines(self) -> Iterator[str]:
        """Give each line once."""
        yield from (line.replace("{}", ", ".join(named)) for line, named in self._tasks.items())


# -- sweep -------------------------------------------------------------------------------------------------------------


def _of_search(params: Params, cells: Sequence[Cell]) -> Iterator[str]:
    given, sweep = params.explicit.sweep, params.sweep
    reasons: dict[str, str] = {}
    if sweep.scheduler != "asha":
        reasons["reduction_factor"] = f"sweep.scheduler is {sweep.scheduler}, it is for asha"
    if sweep.scheduler == "fifo":
        reasons["grace_epochs"] = "sweep.scheduler is fifo, which lets every trial end"
    if sweep.early_exit.after and sweep.search == "optuna":
        reasons["early_exit"] = "Optuna asks for points one after another, so that none has others to be compared with"
    elif not sweep.early_exit.after:
        reasons["early_exit"] = "sweep.early_exit.after names no point, so that nobody is compared"
    if sweep.search != "optuna":
        reasons["warm_start"] = f"sweep.search is {sweep.search}, it is for optuna"
    if sweep.search == "grid":
        reasons |= dict.fromkeys(("num_samples", "seed"), "sweep.search is grid, which takes every point")
    if not any(cell.search for cell in cells):  # a scheduler compares the trials of one search
        settings = ("num_samples", "seed", "warm_start", "grace_epochs", "reduction_factor", "early_exit")
        of_searches = ("search", "scheduler", *settings)
        reasons |= dict.fromkeys(of_searches, "no row of these studies is searched")
    if sweep.pack != 1 and not any(map(_packs, cells)):
        reasons["pack"] = "no two trials of these studies can share a pass"
    for name, reason in reasons.items():
        if name in given:
            yield f"sweep.{name}={given[name]} changes nothing here: {reason}"


def _packs(cell: Cell) -> bool:
    try:
        return pack_key(cell.trial((corners(cell) or [{}])[0])) is not None
    except InputError:  # which is said by itself
        return True


# -- evaluate ----------------------------------------------------------------------------------------------------------


def _of_evaluation(params: Params, cells: Sequence[Cell]) -> Iterator[str]:
    given, here, more = params.explicit.evaluate, list(dict.fromkeys(cell.task for cell in cells)), _Sentences()
    asked = given.get("num_evaluation_samples", 0)
    for task in here:
        drawn = params.subsample.of(task).num_evaluation
        there = tasks.get(task).official_evaluation if drawn == "whole" else drawn
        if there is not None and asked > there:
            more.of(task, f"evaluate.num_evaluation_samples={asked}: {there} are drawn and all scored: {{}}")
    yield from more.lines()
    with_vqa = [task for task in map(tasks.get, here) if isinstance(task, VqaTask)]
    generation, batch = given.get("generation", {}), given.get("drop_incomplete_batch")
    if "vqa_normalise" in given and not with_vqa:
        yield f"evaluate.vqa_normalise={given['vqa_normalise']} changes nothing here: no task has VQA accuracy"
    if given.get("stem_predictions") and not any(task.stemmed_references for task in with_vqa):
        yield "evaluate.stem_predictions=True changes nothing here: no task has stems as references"
    if batch is not None and not any(map(_shows, cells)):
        yield f"evaluate.drop_incomplete_batch={batch} changes nothing here: no row shows demonstrations at evaluation"
    if "length_penalty" in generation and all(_beams(params, cell) == 1 for cell in cells):
        yield (
            f"evaluate.generation.length_penalty={generation['length_penalty']} changes nothing here: it is for beams, "
            "and evaluate.generation.num_beams is 1"
        )


def _shows(cell: Cell) -> bool:
    return not methods.is_trained(cell.method) and baselines.get(cell.method).shows_demonstrations


def _beams(params: Params, cell: Cell) -> int:
    asked = params.evaluate.generation.num_beams
    return methods.published_decoding(cell.method).num_beams if asked == "published" else asked
