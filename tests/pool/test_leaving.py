"""A slot whose node is to be taken away, or whose sweep ends: its ranks are told to stop, and keep their step."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from pipeline.cli import command_line
from pipeline.commands import slurm
from pipeline.config.load import load
from pipeline.core import machine
from pipeline.core.errors import WorkError
from pipeline.core.machine import notice
from pipeline.pool import cluster
from pipeline.pool import slot as slots
from pipeline.pool.queue import SlotLeft
from pipeline.pool.slot import Slot
from tests.conftest import ROOT


class Call:
    def __init__(self, call: Any) -> None:
        self.remote = call


class Rank:
    """A worker's handle: `advance` ends when it is told to stop, as the workbench's does behind its step."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.calls: list[str] = []
        self.advance, self.stop, self.steps = Call(self._advance), Call(self._stop), Call(self._steps)

    async def _advance(self) -> list[Any]:
        self.calls.append("advance")
        await asyncio.wait_for(self.stopped.wait(), 5)
        raise SlotLeft("its last step is kept")

    async def _stop(self) -> None:
        self.calls.append("stop")
        self.stopped.set()

    async def _steps(self) -> int:
        return len(self.calls)


def advanced(monkeypatch, ranks: int, leaving: list[set[str]]) -> tuple[list[Rank], str]:
    """Advance a slot of ranks on the nodes a and b; `leaving` says which are drained, look by look."""
    monkeypatch.setattr(slots, "STEP_SECONDS", 0.01)

    async def draining() -> set[str]:
        return leaving.pop(0) if leaving else set()

    monkeypatch.setattr(slots, "draining", draining)

    async def go() -> tuple[list[Rank], str]:
        slot = Slot(load(ROOT / "params.yaml").sweep, ranks, ".")
        workers = [Rank() for _ in range(ranks)]
        slot.workers, slot.nodes = workers, {"a", "b"}
        work = asyncio.ensure_future(slot.advance())
        with pytest.raises(SlotLeft) as left:
            await work
        return workers, str(left.value)

    return asyncio.run(go())


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_is_told_once_and_keeps_its_step(monkeypatch, ranks):
    workers, why = advanced(monkeypatch, ranks, [set(), {"c"}, {"b", "c"}, {"b"}, {"b"}])
    assert [rank.calls for rank in workers] == [["advance", "stop"]] * ranks and why == "its last step is kept"


def test_a_slot_on_a_drained_node_begins_nothing(monkeypatch):
    (rank,), why = advanced(monkeypatch, 1, [{"a"}])
    assert rank.calls == [] and "taken away" in why


def test_a_sweep_that_ends_in_order_lets_its_slots_keep_their_step_in_the_time_there_is(monkeypatch):
    async def go(worker: Rank, seconds: float) -> Rank:
        slot = Slot(load(ROOT / "params.yaml").sweep, 1, ".")
        await slot.keep(seconds)  # it has not begun
        slot.workers = [worker]
        slot.work = asyncio.ensure_future(slot._all("advance"))
        await asyncio.sleep(0.01)
        await slot.keep(seconds)
        return worker

    assert asyncio.run(go(Rank(), 5)).calls == ["advance", "stop"]
    deaf = Rank()
    deaf.stopped = asyncio.Event()
    deaf.stop = Call(lambda: asyncio.sleep(60))
    started = time.monotonic()
    assert asyncio.run(go(deaf, 0.1)).calls == ["advance"] and time.monotonic() - started < 3


def test_the_notice_is_read_with_a_token_and_says_how_long_is_left(metadata, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.address + "/")
    assert notice() is None and metadata.looks == 1
    metadata.ends_in = 120.0
    seconds = notice()
    assert seconds is not None and 110 < seconds <= 120
    metadata.close()
    with pytest.raises(WorkError, match=f"{metadata.address}.*no notice can be read"):
        notice()


def test_a_look_that_fails_is_made_again(monkeypatch):
    """The service may be busy for a moment; the end of the instance is announced once."""
    answers: list[Any] = [None, WorkError("busy"), 90.0]
    drained = []

    def look() -> float | None:
        answer = answers.pop(0)
        if isinstance(answer, WorkError):
            raise answer
        return answer

    monkeypatch.setattr(machine, "notice", look)
    monkeypatch.setattr(cluster, "drain", lambda seconds, node: drained.append((seconds, node)))
    monkeypatch.setattr(slurm, "_NOTICE_SECONDS", 0.0)
    arguments = command_line().parse_args(["notice", "--node", "n"])
    arguments.func(arguments)
    assert drained == [(90.0, "n")] and not answers
