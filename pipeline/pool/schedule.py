"""Tune's schedulers and Optuna, one instance a cell: trials of different tasks are never compared."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipeline.config.load import Params
from pipeline.core.errors import InputError
from pipeline.plan.plan import Plan
from pipeline.plan.space import Cell, parse_range
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
    """Optuna's TPE for every cell with a space, the cells in turn, `num_samples` trials each."""

    def __init__(self, params: Params, cells: list[Cell]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._left = {cell.name: params.sweep.num_samples for cell in cells}
        self._own = {
            cell.name: OptunaSearch(space=_optuna_space(cell), metric=METRIC, mode="max", seed=params.sweep.seed)
            for cell in cells
        }
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
