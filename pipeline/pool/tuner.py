"""The only file that starts Ray Tune: trials to a dispatcher and its slots, on a cluster that is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from pipeline.config.load import Params, Requests, Sweep
from pipeline.config.trial import MOST_PACKED, TrialConfig
from pipeline.core.errors import InputError, WorkError
from pipeline.core.progress import say
from pipeline.plan.plan import Plan, compared_groups, in_lanes, side_by_side
from pipeline.plan.space import Cell
from pipeline.pool.dispatcher import Dispatcher
from pipeline.pool.messages import PROXY_DIED, EpochEnded, Tell, TrialEnded, TrialStarted
from pipeline.pool.processes import GROW_SECONDS, NODES_SECONDS, keep_seconds
from pipeline.pool.proxy import TrialProxy
from pipeline.pool.queue import Halving, Queue
from pipeline.pool.schedule import PerCellOptuna, make_scheduler
from pipeline.pool.slot import KeptSlots, Slot
from pipeline.records.store import TrialStore
from pipeline.records.trial import EpochReport

Beside = Callable[[Any], AbstractContextManager[None]]  # of a dispatcher
# the dispatcher and the proxies only wait, so they take no processor; on the head, whose loss ends a sweep anyway
ON_HEAD = {"node:__internal_head__": 0.0001}
MOST_PROXIES = 128  # Tune's processes for packs, about 100 MB each on the head; every slot has one trial in any case
MOST_WAITING = 4  # trials that wait ready, at most one a slot: no slot idles, and a slot has a choice


class _Events(tune.Callback):
    """Tells what happens to the trials, by key, and stops in its slot what Tune has stopped.

    Where slots are added, Tune may have more trials in progress: `limit` holds how many; None: there are no more slots.
    """

    def __init__(self, plan: Plan, tell: Tell, dispatcher: Any, limit: Any) -> None:
        self._plan, self._tell, self._dispatcher, self._limit = plan, tell, dispatcher, limit
        self._asked_at = time.monotonic()

    def __reduce__(self) -> Any:
        # Tune pickles its callbacks for a restore that this project never does
        return tune.Callback, ()

    def _key(self, trial: Any) -> str:
        return trial.config.get("trial") or self._plan.request(trial.config).key

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._limit is not None and time.monotonic() > self._asked_at + GROW_SECONDS:
            slots = ray.get(self._dispatcher.num_slots.remote())
            self._limit.max_concurrent = most_in_progress(self._plan.params.sweep, slots)
            self._asked_at = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(TrialStarted(self._key(trial)))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        report = EpochReport.among(result)  # without what Tune adds
        if report.metrics:
            self._tell(EpochEnded(self._key(trial), report))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        key, error = self._key(trial), (trial.last_result or {}).get("error")
        if error != PROXY_DIED:
            ray.get(self._dispatcher.stop.remote(key))
        self._tell(TrialEnded(key, error))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # its proxy died more often than is normal; the trial's state is in the store, for the next driver
        self._tell(TrialEnded(self._key(trial), PROXY_DIED))


class _Orphaned(tune.Stopper):
    """Ends all trials once one has found the dispatcher dead."""

    def __init__(self) -> None:
        self._dead = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._dead |= result.get("error") == PROXY_DIED
        return False

    def stop_all(self) -> bool:
        """See `tune.Stopper`."""
        return self._dead


def count_slots(sweep: Sweep, world_size: int, trials: int) -> int:
    """Return how many slots fit the cluster (or are asked for), no more than there are trials.

    The nodes of a cluster join one after the other, when it is new or its head was lost, and one that was lost may come
    back: where no slot fits those that are there, they are waited for.

    Raises:
        InputError: not even one slot fits.
    """
    have, until = ray.cluster_resources(), time.monotonic() + NODES_SECONDS
    if sweep.address is not None and _fits(sweep, have, world_size) < 1 and _are_awaited(have):
        say(f"no slot fits the nodes of the cluster at {sweep.address} that are there; waiting for more")
        while _fits(sweep, have := ray.cluster_resources(), world_size) < 1 and time.monotonic() < until:
            time.sleep(1)
    fit = _fits(sweep, have, world_size)
    if fit < 1:
        raise InputError(
            f"a slot needs {world_size} x {sweep.cpus_per_worker} CPU and {sweep.gpus_per_worker} GPU, the cluster has "
            f"{have.get('CPU', 0)} CPU and {have.get('GPU', 0)} GPU",
            where="sweep",
            way_out="Lower sweep.cpus_per_worker, sweep.gpus_per_worker or train.world_size",
        )
    return max(1, min(fit if sweep.slots == "auto" else sweep.slots, trials))


def _are_awaited(have: Mapping[str, float]) -> bool:
    """Whether nodes of a shared cluster are still to come: none that trains has joined yet, or one was lost."""
    return not have.get("CPU") or not all(node["Alive"] for node in ray.nodes())


def room(sweep: Sweep, world_size: int) -> int:
    """Return how many slots fit the cluster as it is."""
    return _fits(sweep, ray.cluster_resources(), world_size)


def _fits(sweep: Sweep, have: Mapping[str, float], world_size: int) -> int:
    return sweep.slots_on(have.get("CPU", 0), have.get("GPU", 0), world_size)


def most_in_progress(sweep: Sweep, slots: int) -> int:
    """Return how many trials Tune may have in progress: what the slots' packs hold, and some that wait ready.

    All those that are compared with each other have to be there, for they wait for each other.
    """
    device = "cuda" if sweep.gpus_per_worker else "cpu"
    together = MOST_PACKED[device] if sweep.pack == "auto" else sweep.pack
    waiting = min(slots, MOST_WAITING)
    group = sweep.early_exit.group if sweep.early_exit.after else 0
    return max(max(slots, min(slots * together, MOST_PROXIES)) + waiting, group)


def run_trials(
    plan: Plan, keys: list[str], params: Params, tell: Tell, store: TrialStore, actor: Any = Dispatcher,
    kept: KeptSlots | None = None, beside: Beside = nullcontext,
) -> None:  # fmt: skip
    """Train the trials `keys` (and, under Optuna, the points that it asks for) on the current cluster.

    Returns when every one has ended; which ones failed is in the trial store.

    Args:
        plan: names them.
        keys: of trials that are open.
        params: the sweep's.
        tell: is told what becomes of them.
        store: as the sweep holds it.
        actor: the dispatcher's class; `hificl bench scale` gives one whose slots are simulated.
        kept: slots of the driver's earlier works, and for its later ones; None: the slots end with the trials.
        beside: does something else with the dispatcher's slots while they have nothing to train.
    """
    for world_size, of_size, searched in by_world_size(plan, keys):
        _run(plan, of_size, searched, params, tell, store, world_size, actor, kept, beside)


def by_world_size(plan: Plan, keys: list[str]) -> list[tuple[int, list[str], list[Cell]]]:
    """Return the trials `keys`, and the cells that Optuna searches, by the ranks that they train on."""
    of_key = {key: plan.trials[key].world_size for key in keys}
    of_cell = {cell.name: cell.train.world_size for cell in plan.searched}
    return [
        (size, [key for key in keys if of_key[key] == size], [c for c in plan.searched if of_cell[c.name] == size])
        for size in sorted({*of_key.values(), *of_cell.values()})
    ]


def trained_before(store: TrialStore) -> Iterator[tuple[TrialConfig, float]]:
    """Give the store's finished trials that this code knows, and what each is chosen by."""
    for key in store.all_keys():
        with suppress(InputError):  # of other code, or damaged, which is for `trace` to say
            score = store.objective(key)
            if score is not None:
                yield store.config(key), score


def halving_of(groups: Sequence[Sequence[str]], keys: Collection[str], sweep: Sweep, store: TrialStore) -> Halving:
    """Return who leaves early, told what earlier sweeps saw; trials that are not among the open `keys` have ended."""
    halving = Halving(sweep.early_exit.after, sweep.early_exit.keep, groups)
    for key in (key for group in groups for key in group):
        for loss in store.trial(key).compared():
            halving.tell(key, loss.after, loss.loss)
        if key not in keys:
            halving.end(key)
    return halving


def _run(
    plan: Plan, keys: list[str], adaptive: list[Cell], params: Params, tell: Tell, store: TrialStore, world: int,
    actor: Any, kept: KeptSlots | None, beside: Beside,
) -> None:  # fmt: skip
    slots = count_slots(params.sweep, world, len(keys) + len(adaptive) * params.sweep.num_samples)
    run_ahead = params.sweep.scheduler == "fifo"
    groups, after = compared_groups(plan, world), params.sweep.early_exit.after
    compared = {key for group in groups for key in group}
    requests = {key: plan.request_of(plan.trials[key]) for key in keys}
    requests |= {key: replace(requests[key], compared_after=after) for key in compared & requests.keys()}
    resolve = plan.request if adaptive else Requests(requests)
    order = side_by_side(in_lanes(plan, keys, slots), groups)
    queue = Queue(slots, params.sweep.retry.max_attempts, run_ahead=run_ahead, order=order)
    another = partial(Slot, params.sweep, world, str(Path.cwd()), params.evaluate.generation.batch_size)
    built, done = kept.take(world, slots) if kept else [], False
    grows = params.sweep.slots == "auto" and params.sweep.address is not None
    dispatcher = actor.options(resources=ON_HEAD).remote(
        resolve,
        store,
        queue,
        [*built, *(another() for _ in range(slots - len(built)))],
        *(partial(room, params.sweep, world), another) if grows else (None, None),
        halving_of(groups, set(keys), params.sweep, store),
    )
    try:
        ray.get(dispatcher.start.remote())
        trainable = tune.with_resources(tune.with_parameters(TrialProxy, dispatcher=dispatcher), ON_HEAD)
        known = trained_before(store) if adaptive and params.sweep.warm_start else ()
        for space, search in ((keys, None), (adaptive, PerCellOptuna(params, adaptive, known) if adaptive else None)):
            if not space:
                continue
            samples = len(adaptive) * params.sweep.num_samples if search else 1
            most = most_in_progress(params.sweep, slots)
            limit = ConcurrencyLimiter(search, most) if search else BasicVariantGenerator(max_concurrent=most)
            tuner = tune.Tuner(
                trainable,
                param_space=None if search else {"trial": tune.grid_search(order)},
                tune_config=tune.TuneConfig(
                    scheduler=make_scheduler(params, plan, keys, store.epochs), search_alg=limit, num_samples=samples,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="sweep", storage_path=str(plan.places.runs / ".tune"), verbose=0, stop=_Orphaned(),
                    callbacks=[_Events(plan, tell, dispatcher, limit if grows else None)],
                    # a proxy that dies asks again for what it has seen; what fails for good is no failure to Tune
                    failure_config=tune.FailureConfig(max_failures=params.sweep.retry.max_attempts),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                ),
            )  # fmt: skip
            with beside(dispatcher):
                tuner.fit()
                ray.get(dispatcher.num_slots.remote())
        done = True
    except ray.exceptions.ActorDiedError:
        raise WorkError("the dispatcher died") from None
    except tune.TuneError as error:
        raise WorkError(f"Ray Tune gave up: {error}") from error
    finally:
        with suppress(ray.exceptions.RayError):  # it may be what was lost
            if done and kept is not None:
                kept.put(ray.get(dispatcher.release.remote(), timeout=30), dispatcher)
            else:
                ray.get(dispatcher.close.remote(keep_seconds()), timeout=30 + keep_seconds())
                ray.kill(dispatcher)
