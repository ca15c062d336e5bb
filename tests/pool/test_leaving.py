"""A slot whose node is to be taken away: one rank keeps its step, several leave before their next epoch."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pipeline.cli import command_line
from pipeline.commands import studies
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
        if ranks > 1:
            await asyncio.sleep(0.2)
            for worker in workers:
                worker.stopped.set()
        with pytest.raises(SlotLeft) as left:
            await work
        return workers, str(left.value)

    return asyncio.run(go())


def test_one_rank_is_told_once_and_keeps_its_step(monkeypatch):
    (rank,), why = advanced(monkeypatch, 1, [set(), {"c"}, {"b", "c"}, {"b"}, {"b"}])
    assert rank.calls == ["advance", "stop"] and why == "its last step is kept"


def test_a_slot_on_a_drained_node_begins_nothing(monkeypatch):
    (rank,), why = advanced(monkeypatch, 1, [{"a"}])
    assert rank.calls == [] and "taken away" in why


def test_several_ranks_stand_at_different_steps_and_are_not_stopped(monkeypatch):
    ranks, _ = advanced(monkeypatch, 2, [set(), *[{"a"}] * 9])
    assert [rank.calls for rank in ranks] == [["advance"]] * 2


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
    monkeypatch.setattr(studies, "_NOTICE_SECONDS", 0.0)
    arguments = command_line().parse_args(["notice", "--node", "n"])
    arguments.func(arguments)
    assert drained == [(90.0, "n")] and not answers
