"""A scheduler's word and a searcher's points on a real Ray Tune: only the slots are played, which train nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import sys
from collections import Counter
from dataclasses import replace

import pytest
import ray

from pipeline.config.load import BackboneSource, TrialRequest, load
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import WorkError
from pipeline.plan.plan import as_given, make_plan, places
from pipeline.plan.space import cells
from pipeline.pool import tuner
from pipeline.pool.cluster import running
from pipeline.pool.dispatcher import Dispatcher
from pipeline.pool.messages import PROXY_DIED, Result, TrialEnded
from pipeline.pool.proxy import TrialProxy
from pipeline.pool.queue import Queue
from pipeline.records.store import TrialStore
from pipeline.records.trial import Act, ComparedLoss, EpochReport, TrialEnd, TrialReport
from tests.conftest import ROOT

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the dispatcher's process does not find this file
EPOCHS, POINTS = 3, 3
BAD, GOOD = (
    TrialConfig(backbone="b", backbone_digest="0", task="mini-vqa", manifest_digest="1", method="hificl", seed=seed)
    for seed in (1, 2)
)
BEST = {"mini-vqa": 1.0, "mini-coco": 0.1}  # of each task's first trial; whoever comes later has half of it, and so on


class Slot:
    """Reports one epoch after another of the trial in it."""

    def __init__(self, store: TrialStore) -> None:
        self.store, self.keys, self.pids = store, set(), []
        self.objective, self.epochs, self.seen = {}, Counter(), Counter()
        self.why_room = ""

    async def build(self) -> None: ...

    def drop(self) -> None:
        self.keys.clear()

    async def room(self) -> int:
        return 1 - len(self.keys)

    async def admit(self, request) -> int:
        task = request.config.task
        self.keys.add(request.key)
        self.objective[request.key] = BEST[task] / 2 ** self.seen[task]
        self.seen[task] += 1
        return 0

    async def evict(self, key: str) -> None:
        self.keys.discard(key)

    async def advance(self) -> list[TrialReport]:
        await asyncio.sleep(0)
        (key,) = self.keys
        self.epochs[key] += 1
        row = EpochReport(epoch=self.epochs[key], objective=self.objective[key])
        self.store.trial(key).write_epochs([*self.store.epochs(key), row])
        done = row.epoch == EPOCHS
        if done:
            self.store.finish(key, TrialEnd(status="finished", epochs=EPOCHS, objective=row.objective))
        return [TrialReport(key, row.epoch, row, "finished" if done else None)]


@ray.remote(num_cpus=0, max_concurrency=10000)
class Played(Dispatcher.__ray_metadata__.modified_class):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.slots = [Slot(self.store) for _ in self.slots]


@pytest.mark.slow
@pytest.mark.parametrize("search", ["grid", "optuna"])
def test_asha_ends_the_worse_of_a_task_after_the_grace_epoch_and_spares_another_tasks_first(tmp_path, search, cluster):
    settings = {
        "train.epochs": EPOCHS, "sweep.slots": 1, "sweep.pack": 1, "sweep.scheduler": "asha", "sweep.grace_epochs": 1,
        "sweep.reduction_factor": 2, "sweep.search": search, "sweep.num_samples": POINTS,
    }  # fmt: skip
    params = load(ROOT / "params.yaml", [f"{name}={value}" for name, value in settings.items()])
    domain = {"grid": [0.002, 0.01, 0.05], "optuna": {"loguniform": [0.002, 0.05]}}[search]
    made = [cell for cell in cells(params, "miniature-search", as_given(params)) if cell.search]
    made = [
        replace(next(cell for cell in made if cell.task == task), search={"learning_rate": domain}) for task in BEST
    ]
    plan = make_plan(params, made, places(tmp_path))
    told: list[Result] = []
    tuner.run_trials(plan, list(plan.trials), params, told.append, TrialStore(plan.places.runs), Played)
    store = TrialStore(plan.places.runs)
    keys = store.all_keys()
    assert sorted(message.key for message in told if isinstance(message, TrialEnded)) == keys
    ends = {(store.config(key).task, store.epochs(key)[0].objective): store.done(key) for key in keys}
    assert {which: (end.status, end.epochs) for which, end in ends.items()} == {
        (task, best / 2**number): ("stopped", 1) if number else ("finished", EPOCHS)
        for task, best in BEST.items()
        for number in range(POINTS)
    }


class Comparing(Slot):
    """Comes to each point at which its trial is compared, with a loss by its learning rate, then to the end."""

    def __init__(self, store: TrialStore) -> None:
        super().__init__(store)
        self.points: dict[str, list[float]] = {}
        self.rate: dict[str, float] = {}

    async def admit(self, request) -> int:
        self.points.setdefault(request.key, list(request.compared_after))
        self.rate[request.key] = request.config.learning_rate
        with (self.store.root / "admitted").open("a") as file:
            file.write(f"{request.key}\n")
        return await super().admit(request)

    async def advance(self) -> list[TrialReport]:
        (key,) = self.keys
        if not self.points[key]:
            return await super().advance()
        loss = ComparedLoss(after=self.points[key].pop(0), step=1, loss=abs(math.log(self.rate[key] / 0.01)))
        self.store.trial(key).write_compared([*self.store.trial(key).compared(), loss])
        return [TrialReport(key, self.epochs[key], compared=(loss,))]


@ray.remote(num_cpus=0, max_concurrency=10000)
class Compared(Dispatcher.__ray_metadata__.modified_class):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.slots = [Comparing(self.store) for _ in self.slots]


@pytest.mark.slow
def test_trials_of_a_search_leave_it_within_an_epoch_by_their_losses_alone(tmp_path, cluster):
    """One slot that holds one trial, so that of two in progress both would wait for ever for those to come."""
    settings = {"train.epochs": EPOCHS, "sweep.slots": 1, "sweep.pack": 1, "sweep.early_exit.after": "[0.25, 0.5]"}
    params = load(ROOT / "params.yaml", [f"{name}={value}" for name, value in settings.items()])
    rates = [0.2, 0.003, 0.008, 0.05, 0.0001, 0.03]
    made = [cell for cell in cells(params, "miniature-search", as_given(params)) if cell.search]
    made = [replace(next(cell for cell in made if cell.task == task), search={"learning_rate": rates}) for task in BEST]
    plan = make_plan(params, made, places(tmp_path))
    told: list[Result] = []
    store = TrialStore(plan.places.runs)
    tuner.run_trials(plan, list(plan.trials), params, told.append, store, Compared)
    assert sorted(message.key for message in told if isinstance(message, TrialEnded)) == sorted(plan.trials)
    for task in BEST:
        ends = {c.learning_rate: store.done(key) for key, c in plan.trials.items() if c.task == task}
        assert {rate for rate, end in ends.items() if end.status == "finished"} == {0.008, 0.03}
        assert {end.status for rate, end in ends.items() if rate not in (0.008, 0.03)} == {"stopped"}
        assert ends[0.003].error == "left the search after 0.5 epochs: a loss of 1.204, number 3 of 3"
        assert ends[0.05].error == "left the search after 0.25 epochs: a loss of 1.609, number 4 of 6"
    left = {key: end for key in plan.trials if (end := store.done(key)).status == "stopped"}
    admitted = (store.root / "admitted").read_text()
    told.clear()
    tuner.run_trials(plan, list(left), params, told.append, store, Compared)  # the next sweep: by the ledger alone
    assert {message.key for message in told if isinstance(message, TrialEnded)} == left.keys()
    assert {key: store.done(key) for key in left} == left and (store.root / "admitted").read_text() == admitted


@pytest.mark.slow
def test_a_trial_that_is_stopped_by_hand_while_it_trains_gives_its_slot_to_the_next(tmp_path, cluster):
    settings = {"train.epochs": EPOCHS, "sweep.slots": 1, "sweep.pack": 1}
    params = load(ROOT / "params.yaml", [f"{name}={value}" for name, value in settings.items()])
    made = [cell for cell in cells(params, "miniature-search", as_given(params)) if cell.search and cell.task in BEST]
    plan = make_plan(params, made[:2], places(tmp_path))
    store, (begun, waiting, *others) = TrialStore(plan.places.runs), plan.trials
    store.act(Act(time=0.0, act="stop", trial=begun, after=1))
    store.act(Act(time=0.0, act="stop", trial=waiting))
    told: list[Result] = []
    tuner.run_trials(plan, list(plan.trials), params, told.append, store, Played)
    assert sorted(message.key for message in told if isinstance(message, TrialEnded)) == sorted(plan.trials)
    ends = {key: (store.done(key).status, store.done(key).epochs) for key in plan.trials}
    assert ends == {begun: ("stopped", 1), waiting: ("stopped", 0)} | dict.fromkeys(others, ("finished", EPOCHS))
    assert others and store.halted(begun) and store.halted(waiting)


class Slow(Slot):
    async def advance(self) -> list[TrialReport]:
        await asyncio.sleep(1)  # a trial takes longer than Tune does to start the next one
        return await super().advance()


@ray.remote(num_cpus=0, max_concurrency=10000)
class Growing(Dispatcher.__ray_metadata__.modified_class):
    grow_seconds = 0.3

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.slots = [Slow(self.store) for _ in self.slots]
        self.another = lambda: Slow(self.store)


class Failing(Slot):
    async def advance(self) -> list[TrialReport]:
        if self.keys & {BAD.key}:
            raise RuntimeError("no memory")
        return await super().advance()


def test_an_end_that_cannot_be_written_leaves_its_trial_open_and_the_slot_served(tmp_path, monkeypatch):
    """`EMFILE` there ended the loop that serves the slot, and the sweep waited for ever."""
    store = TrialStore(tmp_path)
    requests = {config.key: TrialRequest(config, "", "", BackboneSource()) for config in (BAD, GOOD)}

    def full(self: TrialStore, key: str, end: TrialEnd) -> None:
        if key == BAD.key:
            raise OSError(errno.EMFILE, "Too many open files")
        finish(self, key, end)

    finish = TrialStore.finish
    monkeypatch.setattr(TrialStore, "finish", full)

    async def go() -> list[TrialReport]:
        dispatcher = Dispatcher.__ray_metadata__.modified_class(
            lambda given: requests[given["key"]], store, Queue(1, 2, run_ahead=True), [Failing(store)]
        )
        await dispatcher.start()
        for key in requests:
            await dispatcher.submit({"key": key})
        ends = [await asyncio.wait_for(dispatcher.next(key, seen), 60) for key, seen in zip(requests, (0, EPOCHS - 1))]
        await dispatcher.close()
        return ends

    assert [report.end for report in asyncio.run(go())] == ["failed", "finished"]
    first, second = requests
    assert store.done(first) is None and store.done(second).status == "finished"
    (event,) = [
        event
        for event in map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines())
        if event["event"] == "end not written"
    ]
    assert event["trial"] == first and "Too many open files" in event["why"]


@pytest.mark.slow
def test_slots_are_added_where_nodes_join_a_cluster_and_tune_hands_them_trials(tmp_path, monkeypatch, cluster):
    settings = {"train.epochs": EPOCHS, "sweep.pack": 1, "sweep.address": "auto"}
    params = load(ROOT / "params.yaml", [f"{name}={value}" for name, value in settings.items()])
    made = [cell for cell in cells(params, "miniature-search", as_given(params)) if cell.search and cell.task in BEST]
    plan = make_plan(params, made[:2], places(tmp_path))
    counted, most = [], tuner.most_in_progress
    monkeypatch.setattr(tuner, "count_slots", lambda *_: 1)  # the first node; all of this cluster is there later
    monkeypatch.setattr(tuner, "GROW_SECONDS", 0.3)
    monkeypatch.setattr(tuner, "most_in_progress", lambda sweep, slots: counted.append(slots) or most(sweep, slots))
    tuner.run_trials(plan, list(plan.trials), params, lambda _: None, TrialStore(plan.places.runs), Growing)
    store = TrialStore(plan.places.runs)
    assert all(store.done(key).status == "finished" for key in plan.trials)
    events = [json.loads(line)["event"] for line in (plan.places.runs / "journal.jsonl").read_text().splitlines()]
    fit = tuner.room(params.sweep, 1)
    assert fit > 1 and events.count("slot added") == fit - 1 and events.count("slot built") == fit
    assert counted[0] == 1 and counted[-1] == fit


@pytest.fixture(scope="module")
def cluster():
    with running(load(ROOT / "params.yaml").sweep):
        yield


def test_a_process_that_tune_throws_away_before_its_first_step_has_handed_over_nothing():
    proxy = TrialProxy.__new__(TrialProxy)
    proxy.setup({"trial": "a"}, dispatcher=None)  # a call would fail
    assert proxy.reset_config({"trial": "b"})


@ray.remote(num_cpus=0, max_concurrency=10000)
class Dying(Dispatcher.__ray_metadata__.modified_class):
    async def next(self, key: str, seen: int) -> TrialReport:
        os._exit(1)


@pytest.mark.slow
def test_a_dispatcher_that_dies_ends_the_work_at_once_and_no_trial(tmp_path, cluster, capfd):
    """Before, Tune started each actor three times anew, and printed as many tracebacks of each."""
    params = load(ROOT / "params.yaml", ["sweep.slots=1", "sweep.pack=1"])
    made = [cell for cell in cells(params, "miniature-search", as_given(params)) if cell.search and cell.task in BEST]
    plan = make_plan(params, made[:2], places(tmp_path))
    told: list[Result] = []
    with pytest.raises(WorkError, match="^the dispatcher died$"):
        tuner.run_trials(plan, list(plan.trials), params, told.append, TrialStore(plan.places.runs), Dying)
    ended = [message for message in told if isinstance(message, TrialEnded)]
    assert {message.error for message in ended} == {PROXY_DIED} and len(ended) < len(plan.trials)
    assert "Traceback" not in capfd.readouterr().err
