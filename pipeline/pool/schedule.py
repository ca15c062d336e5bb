"""Tune's schedulers and Optuna, one instance a cell: trials of different tasks are never compared."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipeline.config.load import Params
from pipeline.config.trial import TrialConfig, canonical
from pipeline.core.errors import InputError
from pipeline.plan.plan import Plan
from pipeline.plan.space import Cell, Point, is_in, parse_range
from pipeline.records.trial import EpochReport

METRIC = "objective"  # the selection score, or the negative selection loss: larger is better
TIME = "epoch"  # never training_iteration, which starts anew when a trial is resumed


Epochs = Callable[[str], Sequence[EpochReport]]


def make_scheduler(
    params: Params, plan: Plan, keys: Iterable[str] = (), epochs: Epochs = lambda key: ()
) -> TrialScheduler:
    """Return the scheduler that `sweep.scheduler` names.

    It knows what earlier sweeps saw of the plan's trials, so that one that was interrupted stops whom it would have.

    Args:
        params: of the sweep.
        plan: names the trials and their cells.
        keys: of the trials that are open.
        epochs: what is known of a trial.
    """
    sweep = params.sweep
    if sweep.scheduler == "fifo":
        return FIFOScheduler()
    longest = max(config.epochs for config in (*plan.trials.values(), *plan.examples))
    makers: dict[str, Callable[[], TrialScheduler]] = {
        "asha": lambda: AsyncHyperBandScheduler(
            time_attr=TIME, metric=METRIC, mode="max", max_t=longest, grace_period=sweep.grace_epochs,
            reduction_factor=sweep.reduction_factor,
        ),
        # a pause would free nothing, for a trial's actor holds no slot, and its results would count twice afterwards
        "median": lambda: MedianStoppingRule(
            time_attr=TIME, metric=METRIC, mode="max", grace_period=sweep.grace_epochs, min_time_slice=math.inf,
        ),
    }  # fmt: skip
    over: dict[str, list[str]] = defaultdict(list)
    for key in plan.cell_of.keys() - set(keys):
        over[plan.cell_of[key]].append(key)
    return PerCell(makers[sweep.scheduler], lambda trial: _cell_of(plan, trial.config), epochs, over)


def _cell_of(plan: Plan, config: dict[str, Any]) -> str:
    return config["cell"] if "cell" in config else plan.cell_of[config["trial"]]


class PerCell(FIFOScheduler):
    """Gives every cell a scheduler of its own, and the resources in order of arrival.

    Args:
        make: a cell's scheduler.
        cell_of: the cell of one of Tune's trials.
        epochs: what earlier sweeps saw of a trial, by its key.
        over: the keys of each cell's trials that will not be added any more.
    """

    def __init__(
        self, make: Callable[[], TrialScheduler], cell_of: Callable[[Any], str], epochs: Epochs = lambda key: (),
        over: Mapping[str, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._make, self._cell_of, self._epochs, self._over = make, cell_of, epochs, over or {}
        self._own: dict[str, TrialScheduler] = {}

    def _of(self, trial: Any) -> TrialScheduler:
        cell = self._cell_of(trial)
        if cell not in self._own:
            scheduler = self._own[cell] = self._make()
            for key in self._over.get(cell, ()):
                if results := self._known(key):
                    past = Trial("proxy", config={"trial": key}, stub=True)
                    scheduler.on_trial_add(None, past)
                    for result in results:
                        scheduler.on_trial_result(None, past, result)
                    scheduler.on_trial_complete(None, past, results[-1])
        return self._own[cell]

    def _known(self, key: str) -> list[dict[str, float]]:
        return [{TIME: r.epoch, METRIC: r.objective} for r in self._epochs(key) if r.objective is not None]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See `TrialScheduler`; whom an earlier epoch would stop has been stopped, or is wanted whole."""
        scheduler = self._of(trial)
        scheduler.on_trial_add(tune_controller, trial)
        for result in self._known(trial.config["trial"]) if "trial" in trial.config else ():
            scheduler.on_trial_result(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """See `TrialScheduler`."""
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See `TrialScheduler`."""
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """See `TrialScheduler`."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """See `TrialScheduler`."""
        self._of(trial).on_trial_remove(tune_controller, trial)


class PerCellOptuna(Searcher):
    """Optuna's TPE for every cell with a space, the cells in turn, `num_samples` trials each.

    Args:
        params: the project's.
        cells: with a space.
        known: trials of `runs/` and what they were chosen by, from which `sweep.warm_start` takes first points.
    """

    def __init__(self, params: Params, cells: list[Cell], known: Iterable[tuple[TrialConfig, float]] = ()) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._left = {cell.name: params.sweep.num_samples for cell in cells}
        others = [(config, score) for config, score in known if not any(_is_of(cell, config) for cell in cells)]
        self._own = {
            cell.name: OptunaSearch(
                space=_optuna_space(cell), metric=METRIC, mode="max", seed=params.sweep.seed,
                points_to_evaluate=best_elsewhere(cell, others)[: params.sweep.warm_start] or None,
            )
            for cell in cells
        }  # fmt: skip
        self._cell: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next point of the cell that has waited longest."""
        waiting = [name for name, left in self._left.items() if left > 0]
        if not waiting:
            return Searcher.FINISHED
        name = max(waiting, key=lambda n: self._left[n])
        point = self._own[name].suggest(trial_id)
        if not isinstance(point, dict):
            return point
        self._left[name] -= 1
        self._cell[trial_id] = name
        return {"cell": name, **point}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """See `Searcher`."""
        self._own[self._cell[trial_id]].on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See `Searcher`."""
        if trial_id in self._cell:
            self._own[self._cell[trial_id]].on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: a resumed sweep asks anew, and the ledger answers for points already trained."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def best_elsewhere(cell: Cell, known: Iterable[tuple[TrialConfig, float]]) -> list[Point]:
    """Return points of a cell's space that were best in other searches of its method on its backbone.

    Trials that differ in the searched settings alone are a search, on another task or with other samples, seeds or
    settings; only within one are scores compared. First comes the point that was best in most of them.

    Args:
        cell: with a space.
        known: trials that are none of this sweep's searches, and what they were chosen by.
    """
    searches: dict[str, list[tuple[float, Point]]] = defaultdict(list)
    for config, score in known:
        point = _point_of(cell, config)
        if point is not None:
            fixed = {name: value for name, value in _settings(config).items() if name not in point}
            searches[canonical(fixed)].append((score, point))
    best = [max(tried, key=lambda pair: pair[0]) for tried in searches.values() if len(tried) > 1]
    texts = Counter(canonical(point) for score, point in best if math.isfinite(score))
    return [json.loads(text) for text, _ in texts.most_common()]


def _settings(config: TrialConfig) -> Point:
    fields = config.model_dump(mode="json")
    options = fields.pop("options")
    return {**fields, **options}


def _point_of(cell: Cell, config: TrialConfig) -> Point | None:
    """Return the values of a trial that a cell searches over; None where they do not lie in its space."""
    values = _settings(config)
    if (config.backbone, config.method) != (cell.backbone, cell.method) or not cell.search.keys() <= values.keys():
        return None
    if not all(is_in(domain, values[name], name) for name, domain in cell.search.items()):
        return None
    return {name: values[name] for name in cell.search}


def _is_of(cell: Cell, config: TrialConfig) -> bool:
    """Whether a trial is a point of the cell itself: of before an interruption, after which the same are asked for."""
    point = _point_of(cell, config)
    try:
        return point is not None and cell.trial(point).key == config.key
    except InputError:  # the cell has no such trial
        return False


def _optuna_space(cell: Cell) -> dict[str, Any]:
    import optuna

    space: dict[str, Any] = {}
    for name, domain in cell.search.items():
        if isinstance(domain, list):
            space[name] = optuna.distributions.CategoricalDistribution(domain)
            continue
        kind, (low, high) = parse_range(domain, name)
        if kind == "randint":
            space[name] = optuna.distributions.IntDistribution(int(low), int(high))
        else:
            space[name] = optuna.distributions.FloatDistribution(low, high, log=kind == "loguniform")
    if not space:
        raise InputError("nothing to search", where=cell.name)
    return space
