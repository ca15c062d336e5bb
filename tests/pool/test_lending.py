"""Slots that are lent while they have nothing to train, and what is scored in them. Whole: tests/e2e/test_beside.py."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from pipeline.config.load import BackboneSource, TrialRequest
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.pool import evaluators
from pipeline.pool.dispatcher import Dispatcher
from pipeline.pool.evaluators import BesideTraining
from pipeline.pool.queue import Queue
from pipeline.pool.slot import CalledOff, Scorer
from pipeline.records.evaluation import Evaluation
from pipeline.records.store import TrialStore
from pipeline.records.trial import EpochReport, TrialEnd, TrialReport
from tests.support.plans import make_plan

REQUESTS = [
    TrialRequest(TrialConfig(backbone="b", backbone_digest="0", task="t", manifest_digest="1", method="lora", seed=n),
                 "", "", BackboneSource())
    for n in range(3)
]  # fmt: skip


class Slot:
    """Trains a trial in one round."""

    world_size, why_room = 1, ""
    sweep = SimpleNamespace(retry=SimpleNamespace(hang_seconds=0.5))

    def __init__(self, store: TrialStore) -> None:
        self.store, self.workers, self.pids, self.work = store, [object()], [], None
        self.keys: set[str] = set()
        self.called_off: list[int] = []
        self.dropped = 0

    @property
    def idle(self) -> bool:
        return bool(self.workers) and not self.keys

    async def build(self) -> None:
        self.workers = self.workers or [object()]

    def drop(self) -> None:
        self.dropped += 1
        self.keys.clear()
        self.workers = []

    def call_off(self, lending: int) -> None:
        self.called_off.append(lending)

    async def admit(self, request: TrialRequest) -> int:
        self.keys.add(request.key)
        return 0

    async def advance(self) -> list[TrialReport]:
        await asyncio.sleep(0.01)
        (key,) = self.keys
        row = EpochReport(epoch=1, objective=1.0)
        self.store.trial(key).write_epochs([row])
        self.store.finish(key, TrialEnd(status="finished", epochs=1, objective=1.0))
        return [TrialReport(key, 1, row, "finished")]


@pytest.fixture
def pool(tmp_path):
    """`pool(slots)` makes a dispatcher with so many."""
    by_key = {request.key: request for request in REQUESTS}
    store = TrialStore(tmp_path / "runs")

    def make(slots: int = 1):
        queue = Queue(slots, 2, run_ahead=True, order=[REQUESTS[0].key])
        made = [Slot(store) for _ in range(slots)]
        return Dispatcher.__ray_metadata__.modified_class(lambda given: by_key[given["key"]], store, queue, made)

    return make


async def trained(pool, number: int) -> None:
    key = await pool.submit({"key": REQUESTS[number].key})
    report = await asyncio.wait_for(pool.next(key, 0), 20)
    assert report.end == "finished"
    await asyncio.sleep(0.05)


def test_a_slot_is_lent_once_something_has_ended_and_trains_when_it_is_back(pool):
    async def go() -> None:
        dispatcher = pool()
        (slot,) = dispatcher.slots
        await dispatcher.start()
        first = asyncio.ensure_future(dispatcher.lend(0))
        await asyncio.sleep(0.6)
        assert not first.done()  # none is built, and no trial has ended
        await trained(dispatcher, 0)
        lent = await asyncio.wait_for(first, 5)
        assert (lent.worker, lent.ended) == (slot.workers[0], 1)
        second = asyncio.ensure_future(dispatcher.lend(-1))
        key = await dispatcher.submit({"key": REQUESTS[1].key})
        await asyncio.sleep(0.2)
        assert slot.called_off == [lent.number] and not slot.keys and not second.done()
        await dispatcher.take_back(lent.number)
        assert (await asyncio.wait_for(dispatcher.next(key, 0), 20)).end == "finished"
        again = await asyncio.wait_for(second, 5)
        assert again.number > lent.number and again.ended == 2
        later = asyncio.ensure_future(dispatcher.lend(2))
        await dispatcher.end_lending()
        assert await asyncio.wait_for(later, 5) is None and slot.called_off[-1] == again.number
        assert await dispatcher.release() == [] and slot.dropped  # who borrowed it has not given it back

    asyncio.run(go())


def test_a_lending_has_a_number_above_those_of_the_dispatcher_before(pool):
    async def lent(*requests: int) -> int:
        dispatcher = pool()
        await dispatcher.start()
        for number in requests:
            await trained(dispatcher, number)
        number = (await asyncio.wait_for(dispatcher.lend(-1), 5)).number
        await dispatcher.close()
        return number

    first = asyncio.run(lent(0))
    assert asyncio.run(lent(0, 1)) > first  # what was called off there would be refused here


@pytest.mark.parametrize("told", [True, False])
def test_a_lent_slot_whose_worker_died_or_never_answers_is_built_anew(pool, told):
    async def go() -> None:
        dispatcher = pool()
        (slot,) = dispatcher.slots
        await dispatcher.start()
        await trained(dispatcher, 0)
        lent = await asyncio.wait_for(dispatcher.lend(0), 5)
        if told:
            await dispatcher.take_back(lent.number, "a worker died")
            assert slot.dropped == 1
        await trained(dispatcher, 1)
        assert slot.dropped == 1 and bool(slot.called_off) is not told
        await dispatcher.take_back(lent.number, "a worker died")  # too late: it is another's by now
        assert slot.dropped == 1 and len(await dispatcher.release()) == 1

    asyncio.run(go())


def test_what_is_answered_for_a_lending_ends_behind_the_next_batch_and_no_other():
    scorer, batches = Scorer(), []

    def answer(requests, evaluation, part, on_batch) -> list[str]:
        for batch in range(3):
            batches.append(batch)
            if requests == "ends":
                scorer.called_off = 2
            on_batch()
        return ["answers"]

    scorer.bench = SimpleNamespace(answer=answer)
    assert scorer.answer("whole", None, (0, 1), 2) == ["answers"]
    with pytest.raises(CalledOff):
        scorer.answer("ends", None, (0, 1), 2)
    assert batches == [0, 1, 2, 0]
    with pytest.raises(CalledOff):
        scorer.answer("late", None, (0, 1), 1)
    assert scorer.answer("whole", None, (0, 1), 3) == scorer.answer("whole", None, (0, 1)) == ["answers"]


def test_a_cell_is_scored_once_all_its_candidates_have_ended(tmp_path, monkeypatch):
    plan = make_plan(tmp_path, 3)
    store, keys = TrialStore(plan.places.runs), list(plan.trials)
    for config in plan.trials.values():
        store.open(config)
    cells = {"pair": keys[:2], "single": keys[2:], "again": keys[2:]}
    plan.cells = {name: SimpleNamespace(name=name, search={}) for name in cells}
    monkeypatch.setattr(evaluators, "count_slots", lambda *_: 2)
    monkeypatch.setattr(
        evaluators, "candidates", lambda params, cell, _: [({}, plan.trials[k]) for k in cells[cell.name]]
    )
    monkeypatch.setattr(
        evaluators, "choose", lambda params, cell, _: SimpleNamespace(candidates=(), trial=cells[cell.name][-1])
    )
    monkeypatch.setattr(evaluators, "evaluation_of", lambda params, cell, trial: EvaluationConfig(trial=trial))
    beside = BesideTraining(plan, store)
    assert beside._ready() == []
    store.finish(keys[0], TrialEnd(status="finished", epochs=1))
    store.finish(keys[2], TrialEnd(status="finished", epochs=1))
    assert [evaluation.trial for _, evaluation in beside._ready()] == [keys[2]]
    store.finish(keys[1], TrialEnd(status="failed", error="no memory"))
    assert [evaluation.trial for _, evaluation in beside._ready()] == [keys[1]]
    assert beside._ready() == []


@pytest.mark.parametrize("changed", [None, "code", "adapter"])
def test_a_score_that_was_made_beside_training_is_used_once_and_only_for_what_it_was_made_of(
    tmp_path, monkeypatch, changed
):
    config = REQUESTS[0].config
    folder = tmp_path / "runs" / config.key
    (folder / "adapter").mkdir(parents=True)
    weights = folder / "adapter/weights"
    weights.write_text("1")
    asked = EvaluationConfig(trial=config.key)
    job = TrialRequest(config, str(folder), "", BackboneSource()), asked
    score = Evaluation(
        trial=config.key, config=config.model_dump(), evaluation=asked.model_dump(), metric="m", unit="%", value=1.0,
        metrics={"m": 1.0}, num_samples=1, predictions=(),
    )  # fmt: skip
    evaluators._keep_beside(job, score)
    if changed == "code":
        monkeypatch.setattr(evaluators, "_code", lambda: "other")
    elif changed == "adapter":
        weights.write_text("2")
    made = evaluators._made_beside(job)
    assert (made is not None and made.value) == (1.0 if changed is None else False)
    assert evaluators._made_beside(job) is None
    if changed == "code":
        evaluators._keep_beside(job, score)  # clears what other code has made
        assert [path.parent.name for path in (tmp_path / "cache/scores").glob("*/*.json")] == ["other"]


def test_what_was_scored_beside_training_is_not_scored_again(tmp_path, monkeypatch):
    scores, said = {"k": "made"}, []
    monkeypatch.setattr(evaluators, "_made_beside", lambda job: scores.get(job[1].key))
    monkeypatch.setattr(evaluators, "count_slots", lambda *_: 1)
    monkeypatch.setattr(evaluators, "say", said.append)
    params = SimpleNamespace(sweep=SimpleNamespace(pack=1, gpus_per_worker=0, retry=SimpleNamespace(max_attempts=2)))
    job = SimpleNamespace(key="q"), SimpleNamespace(key="k")
    assert list(evaluators.score_on_cluster(params, [job], evaluators.KeptSlots())) == [("k", "made")]
    assert said == ["1 of 1 trials were scored while others trained"]
