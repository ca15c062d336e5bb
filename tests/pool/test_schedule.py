"""Who a scheduler stops and what a searcher asks for: the project's own, fed with results and without a cluster."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.config.load import Params, load
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.plan.plan import Plan, as_given, make_plan, places
from pipeline.plan.space import Cell, cells
from pipeline.pool.schedule import PerCell, PerCellOptuna, _optuna_space, best_elsewhere, make_scheduler
from pipeline.records.trial import EpochReport
from tests.conftest import ROOT

GO, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def params_with(*settings: str) -> Params:
    return load(ROOT / "params.yaml", ["sweep.grace_epochs=2", "sweep.reduction_factor=2", *settings])


def plan_of(params: Params) -> Plan:
    return make_plan(params, cells(params, "miniature-search", as_given(params)), places())


class Tuned:
    """A scheduler with trials of two cells, by cell."""

    def __init__(self, name: str, *, asked: bool, seen: Mapping[int, Sequence[float]] | None = None) -> None:
        """`seen`: the first cell's trials of an earlier sweep, by number: their objectives by epoch."""
        params = params_with(f"sweep.scheduler={name}", "train.epochs=8", *(["sweep.search=optuna"] if asked else []))
        self.plan, self.asked = plan_of(params), asked
        trained = [cell for cell in self.plan.cells.values() if len(cell.search) == 2]  # of six points as a grid
        self.here, self.there = (next(c.name for c in trained if c.task == task) for task in _two_tasks(trained))
        keys = self.keys(self.here)
        known = {
            keys[n]: [EpochReport(epoch=i, objective=x) for i, x in enumerate(objectives, 1)]
            for n, objectives in (seen or {}).items()
        }
        over = {key for key, reports in known.items() if len(reports) == 8}
        open_keys = self.plan.trials.keys() - over
        self.scheduler = make_scheduler(params, self.plan, open_keys, lambda key: known.get(key, ()))

    def keys(self, cell: str) -> list[str]:
        return [key for key, name in self.plan.cell_of.items() if name == cell]

    def trials(self, cell: str, number: int) -> list[Trial]:
        if self.asked:
            configs = [{"cell": cell, "rank": rank} for rank in range(number)]
        else:
            configs = [{"trial": key} for key in self.keys(cell)][:number]
        assert len(configs) == number
        made = [Trial("proxy", config=config, stub=True) for config in configs]
        for trial in made:
            self.scheduler.on_trial_add(None, trial)
        return made

    def says(self, trial: Trial, epoch: int, objective: float, **more: float) -> str:
        # a trial that is resumed in a new sweep begins again with Tune's own count
        result = {"epoch": epoch, "objective": objective, "training_iteration": 1, **more}
        return self.scheduler.on_trial_result(None, trial, result)


def _two_tasks(made: list[Cell]) -> list[str]:
    return sorted({cell.task for cell in made})[:2]


asked = pytest.mark.parametrize("asked", [False, True], ids=["grid", "optuna"])


@asked
def test_asha_stops_the_worse_half_at_the_grace_epochs_and_no_other_task_counts(asked):
    tuned = Tuned("asha", asked=asked)
    good, bad, worse = tuned.trials(tuned.here, 3)
    assert tuned.says(good, 1, 0.1) == tuned.says(bad, 1, 0.0) == GO, "within the grace epochs"
    assert tuned.says(good, 2, 0.9) == GO
    (elsewhere,) = tuned.trials(tuned.there, 1)
    assert tuned.says(elsewhere, 2, 0.1) == GO, "it is the first of its task"
    assert tuned.says(bad, 2, 0.2) == STOP
    assert tuned.says(worse, 3, 0.1) == STOP, "Tune's own count would say that it has just begun"
    assert tuned.says(good, 8, 0.9) == STOP, "its epochs are over"


def test_asha_goes_on_with_what_an_earlier_sweep_saw():
    tuned = Tuned("asha", asked=False, seen={0: [0.3, 0.5], 3: [0.9] * 8})
    again, bad = tuned.trials(tuned.here, 2)
    assert tuned.says(bad, 2, 0.6) == STOP, "the trial that is over was better, the median of three is 0.7"
    assert tuned.says(again, 3, 0.5) == GO, "its second epoch has been seen: this one is no milestone"
    tuned = Tuned("asha", asked=False)
    fresh, other = tuned.trials(tuned.here, 2)
    assert tuned.says(other, 2, 0.6) == GO, "nothing has been seen"
    assert tuned.says(fresh, 3, 0.5) == STOP


def test_median_goes_on_with_what_an_earlier_sweep_saw():
    tuned = Tuned("median", asked=False, seen={3: [0.9] * 8, 4: [0.8] * 8, 5: [0.7] * 8})
    bad, good = tuned.trials(tuned.here, 2)
    assert tuned.says(bad, 3, 0.1) == STOP
    assert tuned.says(good, 3, 0.95) == GO


def test_median_stops_what_is_below_the_median_of_its_own_task_and_pauses_nothing():
    tuned = Tuned("median", asked=True)
    *good, bad = tuned.trials(tuned.here, 4)
    others = tuned.trials(tuned.there, 3)
    for trial in others:
        assert tuned.says(trial, 2, 0.9) == GO
    assert tuned.says(bad, 1, 0.1) == GO
    assert tuned.says(bad, 2, 0.1) == GO, "the three that are better are of another task"
    for trial in good:
        assert tuned.says(trial, 3, 0.8) == GO
    assert tuned.says(bad, 3, 0.1) == STOP
    assert tuned.says(others[0], 3, 0.9) == GO


def test_fifo_stops_nothing():
    params = params_with("sweep.scheduler=fifo")
    assert type(make_scheduler(params, plan_of(params))) is FIFOScheduler


def test_every_word_of_tune_reaches_the_scheduler_of_the_trials_cell_alone():
    heard: list[tuple[Any, ...]] = []

    class Heard(TrialScheduler):
        def __init__(self) -> None:
            self.cell = f"scheduler {len(made)}"
            made.append(self)

        def on_trial_add(self, controller, trial):
            heard.append(("add", self.cell, controller, trial))

        def on_trial_error(self, controller, trial):
            heard.append(("error", self.cell, controller, trial))

        def on_trial_result(self, controller, trial, result):
            heard.append(("result", self.cell, controller, trial, result))
            return GO

        def on_trial_complete(self, controller, trial, result):
            heard.append(("complete", self.cell, controller, trial, result))

        def on_trial_remove(self, controller, trial):
            heard.append(("remove", self.cell, controller, trial))

    made: list[Heard] = []
    scheduler = PerCell(Heard, lambda trial: trial.config["cell"])
    a, b = (Trial("proxy", config={"cell": cell}, stub=True) for cell in "ab")
    tune = object()
    scheduler.on_trial_add(tune, a)
    scheduler.on_trial_add(tune, b)
    assert scheduler.on_trial_result(tune, a, {"epoch": 1}) == GO
    scheduler.on_trial_error(tune, b)
    scheduler.on_trial_complete(tune, a, {"epoch": 2})
    scheduler.on_trial_remove(tune, a)
    of = {cell: scheduler._own[cell].cell for cell in "ab"}
    assert heard == [
        ("add", of["a"], tune, a), ("add", of["b"], tune, b), ("result", of["a"], tune, a, {"epoch": 1}),
        ("error", of["b"], tune, b), ("complete", of["a"], tune, a, {"epoch": 2}), ("remove", of["a"], tune, a),
    ]  # fmt: skip
    assert of["a"] != of["b"]


# -- Optuna ------------------------------------------------------------------------------------------------------------

SAMPLES = 3


def test_each_form_of_a_search_is_optunas_distribution_of_the_same_bounds():
    _, by_name = searcher()
    cell = next(iter(by_name.values()))
    searched = {"rank": [4, 8], "n": {"randint": [2, 9]}, "warmup": {"uniform": [0.1, 0.5]},
                "learning_rate": {"loguniform": [0.001, 0.1]}}  # fmt: skip
    assert _optuna_space(replace(cell, search=searched)) == {
        "rank": CategoricalDistribution([4, 8]), "n": IntDistribution(2, 9), "warmup": FloatDistribution(0.1, 0.5),
        "learning_rate": FloatDistribution(0.001, 0.1, log=True),
    }  # fmt: skip
    with pytest.raises(InputError, match=f"{re.escape(cell.name)}: nothing to search"):
        _optuna_space(replace(cell, search={}))


def test_optuna_is_told_what_larger_is_better_and_that_nothing_failed():
    optuna, _ = searcher()
    assert (optuna.metric, optuna.mode) == ("objective", "max")
    told = []
    point = optuna.suggest("a trial")
    optuna._own[point["cell"]].on_trial_complete = lambda *words: told.append(words)
    optuna.on_trial_complete("a trial", {"objective": 1.0})
    optuna.on_trial_complete("nobody's", {"objective": 2.0})
    assert told == [("a trial", {"objective": 1.0}, False)]


def searcher() -> tuple[PerCellOptuna, dict[str, Cell]]:
    params = params_with("sweep.search=optuna", f"sweep.num_samples={SAMPLES}", "sweep.seed=5")
    found = plan_of(params).searched
    assert len(found) > 1
    return PerCellOptuna(params, found), {cell.name: cell for cell in found}


def test_a_search_begins_with_what_was_best_in_most_others_of_its_method():
    """Of three searches on other samples two prefer a rate; one of a single trial, of another method or out of the
    space says nothing, and neither do the cell's own trials, whatever they came out as."""
    params = params_with("sweep.search=optuna", f"sweep.num_samples={SAMPLES}", "sweep.seed=5", "sweep.warm_start=2")
    searched = {"learning_rate": {"loguniform": [0.001, 0.1]}}
    hificl, mimic = (
        next(c for c in plan_of(params).searched if c.method == method and c.task == "mini-vqa")
        for method in ("hificl", "mimic")
    )
    cell = replace(hificl, search=searched)

    def trials(seed: int, scores: Mapping[float, float], **other: Any) -> list[tuple[TrialConfig, float]]:
        made = cell.trial({"learning_rate": 0.01}).model_copy(update={"seed": seed, **other})
        return [(made.model_copy(update={"learning_rate": rate}), score) for rate, score in scores.items()]

    known = [
        *trials(7, {0.002: 50.0, 0.02: 60.0, 0.05: 40.0}), *trials(8, {0.002: 71.0, 0.02: 70.0}),
        *trials(9, {0.02: 1.0, 0.05: 0.5}), *trials(10, {0.09: 99.0}), *trials(11, {0.5: 99.0, 0.6: 98.0}),
        *trials(12, {0.03: -math.inf, 0.04: -math.inf}), *trials(0, {0.07: 99.0, 0.08: 98.0}),
        *trials(13, {0.06: 99.0, 0.05: 98.0}, method="mimic"), *trials(14, {0.06: 9.0, 0.05: 8.0}, backbone="other"),
    ]  # fmt: skip
    assert hificl.trial({"learning_rate": 0.07}).seed == 0
    optuna = PerCellOptuna(params, [cell], known)
    asked = [optuna.suggest(f"trial {number}")["learning_rate"] for number in range(3)]
    assert asked[:2] == [0.02, 0.002]
    cold = PerCellOptuna(
        params_with("sweep.search=optuna", f"sweep.num_samples={SAMPLES}", "sweep.seed=5"), [cell], known
    )
    assert cold.suggest("trial")["learning_rate"] == asked[2], "Optuna's own points are as without"
    assert best_elsewhere(replace(mimic, search=searched), known) == [{"learning_rate": 0.06}]
    assert best_elsewhere(replace(cell, search={"rank": [2, 4]}), known) == []


def test_cells_take_turns_and_ask_for_num_samples_points_each():
    optuna, by_name = searcher()
    asked = [optuna.suggest(f"trial {number}") for number in range(SAMPLES * len(by_name))]
    names = [point["cell"] for point in asked]
    for start in range(0, len(names), len(by_name)):
        assert set(names[start : start + len(by_name)]) == set(by_name), "each once before one comes again"
    assert Counter(names) == dict.fromkeys(by_name, SAMPLES)
    assert optuna.suggest("one too many") == Searcher.FINISHED
    for point in asked:
        assert by_name[point["cell"]].trial({k: v for k, v in point.items() if k != "cell"}).trained


def test_a_result_reaches_the_study_of_its_cell_and_an_unknown_trial_none():
    optuna, by_name = searcher()
    points = {f"trial {number}": optuna.suggest(f"trial {number}") for number in range(2 * len(by_name))}
    first, second = (t for t, point in points.items() if point["cell"] == next(iter(by_name)))
    optuna.on_trial_result(first, {"epoch": 1, "objective": 0.25, "training_iteration": 1})
    optuna.on_trial_complete(first, {"epoch": 2, "objective": 0.5, "training_iteration": 2})
    optuna.on_trial_complete(second, error=True)
    optuna.on_trial_complete("unknown", {"objective": 1.0})
    for name in by_name:
        states = [(t.state.name, t.value) for t in optuna._own[name]._ot_study.trials]
        mine = name == points[first]["cell"]
        assert states == ([("COMPLETE", 0.5), ("FAIL", None)] if mine else [("RUNNING", None)] * 2)


def test_points_are_those_of_the_seed():
    def some() -> list[dict]:
        optuna, _ = searcher()
        return [optuna.suggest(str(number)) for number in range(4)]

    assert some() == some()
