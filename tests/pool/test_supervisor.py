"""What the stage does when its driver is lost, with drivers that are played."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from pipeline.config.schema import Sweep
from pipeline.core.errors import InputError, WorkError
from pipeline.pool import cluster, driver, supervisor
from pipeline.pool.messages import PROXY_DIED, TrialEnded, TrialStarted, Watcher, WorkRefused
from pipeline.pool.supervisor import Drivers, Training
from pipeline.records.store import Displaced, TrialFolder, TrialStore
from pipeline.records.trial import TrialEnd
from pipeline.sweep.train import failures


class Heard(Watcher):
    """A watcher that keeps what it hears."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, str | None]] = []

    def on_end(self, key: str, error: str | None) -> None:
        self.ends.append((key, error))


class Played:
    """A driver: writes ends into the store, tells of some, and is lost."""

    def __init__(self, root, writes: dict[str, str | None], tells: set[str]) -> None:
        self.root, self.writes, self.tells = root, writes, tells

    def messages(self, work: Training) -> Iterator[TrialEnded]:
        for key, error in self.writes.items():
            assert key in work.keys
            status = "failed" if error else "finished"
            TrialFolder(self.root / key).finish(TrialEnd(status=status, error=error))
            if key in self.tells:
                yield TrialEnded(key, error)
        raise supervisor.Lost("its cluster died")

    def end(self) -> None:
        pass


def play(
    root, monkeypatch, drivers: list[Played], todo: list[str], *, adaptive: bool = False, most: int = 2
) -> tuple[Heard, dict[str, str]]:
    root.mkdir(exist_ok=True)
    plan: Any = SimpleNamespace(places=SimpleNamespace(runs=root))
    params: Any = SimpleNamespace(sweep=SimpleNamespace(retry=SimpleNamespace(max_attempts=most)))
    heard = Heard()
    monkeypatch.setattr(supervisor, "Driver", lambda sweep: drivers.pop(0))
    store = TrialStore(plan.places.runs)
    return heard, supervisor.train(plan, todo, params, store, [heard], Drivers(), adaptive=adaptive)


def test_ends_that_died_with_the_driver_are_told(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    drivers = [Played(runs, {"a": None, "b": None}, {"a"}), Played(runs, {"c": "no memory"}, set())]
    heard, errors = play(runs, monkeypatch, drivers, ["a", "b", "c"])
    assert heard.ends == [("a", None), ("b", None), ("c", "no memory")]  # each once
    assert errors == {}  # of "c" the store knows
    assert not drivers


def test_an_end_that_is_seen_as_the_driver_is_lost_is_told(tmp_path, monkeypatch):
    """What only a second look found done was trained no more, and MLflow never heard of it (found by simulation)."""
    runs, done, looks = tmp_path / "runs", TrialStore.done, iter([None])

    def late(store, key):
        """See nothing at the first look, as over NFS, or beside a worker that goes on for a moment."""
        return next(looks, done(store, key))

    monkeypatch.setattr(supervisor, "_progress", lambda store, keys: (0, 0))
    monkeypatch.setattr(TrialStore, "done", late)
    heard, errors = play(runs, monkeypatch, [Played(runs, {"a": None}, set()), Played(runs, {}, set())], ["a"])
    assert heard.ends == [("a", None)] and errors == {}


def test_a_driver_that_is_lost_again_and_again_is_given_up(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    drivers = [Played(runs, {}, set()), Played(runs, {}, set()), Played(runs, {"a": None}, set())]
    with pytest.raises(WorkError, match="gave up after 2 attempts: its cluster died"):
        play(runs, monkeypatch, drivers, ["a"])
    assert len(drivers) == 1


def test_the_next_driver_waits_once_two_in_turn_did_nothing(tmp_path, monkeypatch):
    """A head that starts again takes 20 s: three drivers that followed each other at once were all lost to it."""
    runs, waits = tmp_path / "runs", []
    monkeypatch.setattr(supervisor.time, "sleep", waits.append)
    lost = [Played(runs, {}, set()) for _ in range(3)]
    play(runs, monkeypatch, [*lost, Played(runs, {"a": None}, set())], ["a"], most=4)
    assert waits == [0, supervisor.AGAIN_SECONDS, 2 * supervisor.AGAIN_SECONDS]
    journal = (runs / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line).get("next_after") for line in journal] == [None, "20 s", "40 s"]


def test_progress_is_that_of_the_sweeps_own_trials(tmp_path, monkeypatch):
    """A store of thousands is not read for a loss."""
    runs = tmp_path / "runs"
    monkeypatch.setattr(supervisor.TrialStore, "all_keys", lambda self: pytest.fail("reads the whole store"))
    play(runs, monkeypatch, [Played(runs, {"a": None}, set())], ["a"])


class Orphaned(Played):
    """A driver whose dispatcher died: Tune gives up the actors that wait for it, and the trials are open."""

    def messages(self, work: Training) -> Iterator[TrialEnded]:
        yield from (TrialEnded(key, PROXY_DIED) for key in work.keys)


def test_a_trial_whose_actor_died_has_not_ended(tmp_path, monkeypatch):
    """Else the display counts it twice, and as failed: seven of four were done, three of them failed."""
    runs = tmp_path / "runs"
    drivers = [Orphaned(runs, {}, set()), Played(runs, {"a": None, "b": None}, {"a", "b"})]
    heard, errors = play(runs, monkeypatch, drivers, ["a", "b"])
    assert heard.ends == [("a", None), ("b", None)] and errors == {} and not drivers


class Searching(Played):
    """A driver whose search asks for two points, and gives up the actor of one."""

    def messages(self, work: Training) -> Iterator[TrialStarted | TrialEnded]:
        yield TrialStarted("well")
        yield TrialStarted("left")
        TrialFolder(self.root / "well").finish(TrialEnd(status="finished", epochs=1))
        yield TrialEnded("well", None)
        yield TrialEnded("left", PROXY_DIED)


def test_a_point_of_a_search_that_is_left_open_is_an_error(tmp_path, monkeypatch):
    """No plan names it, so nothing else would say that the same command has more to do."""
    runs = tmp_path / "runs"
    heard, errors = play(runs, monkeypatch, [Searching(runs, {}, set())], [], adaptive=True)
    assert heard.ends == [("well", None)] and errors == {"left": PROXY_DIED}
    TrialFolder(runs / "bad").finish(TrialEnd(status="failed", error="no memory"))
    assert failures(["well"], TrialStore(runs), {**errors, "bad": "no memory"}) == {"left": PROXY_DIED}
    assert failures(["well", "bad", "open"], TrialStore(runs), {}) == {"bad": "no memory", "open": "it did not end"}


class Stopping(Played):
    """A driver whose scheduler stops a trial, which its slot writes a moment later."""

    def messages(self, work: Training) -> Iterator[TrialEnded | None]:
        yield TrialEnded("a", None)
        yield None
        TrialFolder(self.root / "a").finish(TrialEnd(status="stopped", epochs=1))
        yield None
        yield None


def test_a_stopped_trial_is_told_of_once_its_end_is_written(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    seen = []

    def on_end(self, key, error):
        seen.append((key, (runs / key / "done.json").exists()))

    monkeypatch.setattr(Heard, "on_end", on_end)
    play(runs, monkeypatch, [Stopping(runs, {}, set())], ["a"])
    assert seen == [("a", True)]


def test_a_sweep_that_another_has_displaced_hears_of_nothing_more(tmp_path, monkeypatch):
    """What its driver still tells would be written into runs of MLflow that are the other's."""
    runs = tmp_path / "runs"
    monkeypatch.setattr(TrialStore, "check_held", lambda self: (_ for _ in ()).throw(Displaced("taken over")))
    driver = Played(runs, {"a": None}, {"a"})
    ended: list[set[str]] = []
    monkeypatch.setattr(Played, "end", lambda self: ended.append(self.tells))
    heard = Heard()
    monkeypatch.setattr(supervisor, "Driver", lambda sweep: driver)
    params: Any = SimpleNamespace(sweep=SimpleNamespace(retry=SimpleNamespace(max_attempts=2)))
    plan: Any = SimpleNamespace(places=SimpleNamespace(runs=runs))
    runs.mkdir()
    with pytest.raises(Displaced):
        supervisor.train(plan, ["a"], params, TrialStore(runs), [heard], Drivers(), adaptive=False)
    assert heard.ends == [] and ended == [{"a"}]


def test_who_holds_the_store_is_looked_for_once_a_second(tmp_path, monkeypatch):
    """However often its driver speaks: a look is a file made and removed."""
    runs, clock, looks = tmp_path / "runs", [100.0], []

    class Speaking(Played):
        def messages(self, work: Training) -> Iterator[None]:
            for _ in range(40):
                clock[0] += 0.25
                yield None
            TrialFolder(self.root / "a").finish(TrialEnd(status="finished", epochs=1))

    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(TrialStore, "check_held", lambda self: looks.append(clock[0]))
    play(runs, monkeypatch, [Speaking(runs, {}, set())], ["a"])
    assert looks == [100.25 + second for second in range(10)]


def test_a_machine_that_ray_cannot_start_on_is_refused_before_a_driver_is_started(monkeypatch):
    def refused() -> None:
        raise InputError("too few open files")

    monkeypatch.setattr(supervisor.machine, "require", refused)
    monkeypatch.setattr(supervisor.subprocess, "Popen", lambda *_, **__: pytest.fail("a driver was started"))
    with pytest.raises(InputError, match="too few open files"):
        Drivers(Sweep())


class Steady:
    """A driver that tells of a work what is in it."""

    made: ClassVar[list[Steady]] = []

    def __init__(self, sweep: Sweep) -> None:
        self.made.append(self)
        self.ends = 0

    def messages(self, work: Any) -> Iterator[str]:
        for word in work.words:
            if word == "lost":
                raise supervisor.Lost(word)
            yield word

    def end(self) -> None:
        self.ends += 1


def test_a_command_has_one_driver_for_all_its_works(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "Driver", Steady)
    monkeypatch.setattr(Steady, "made", [])

    def work(*words: str, slots: int = 1) -> Any:
        return SimpleNamespace(words=words, params=SimpleNamespace(sweep=Sweep(slots=slots)))

    def running() -> int:
        assert [driver.ends for driver in Steady.made[:-1]] == [1] * (len(Steady.made) - 1)
        return len(Steady.made)

    with Drivers(Sweep(slots=1)) as drivers:
        assert list(drivers.messages(work("a", "b"))) == ["a", "b"] and list(drivers.messages(work("c"))) == ["c"]
        assert running() == 1
        assert list(drivers.messages(work("d", slots=2))) == ["d"] and running() == 2  # another cluster
        monkeypatch.chdir(tmp_path)
        assert list(drivers.messages(work("e", slots=2))) == ["e"] and running() == 3  # in another folder
        with pytest.raises(supervisor.Lost):
            list(drivers.messages(work("lost", slots=2)))
        assert list(drivers.messages(work("f", slots=2))) == ["f"] and running() == 4
        left = drivers.messages(work("g", "h", slots=2))
        assert next(left) == "g"  # and its messages would be taken for the next work's
        assert list(drivers.messages(work("i", slots=2))) == ["i"] and running() == 5
        left.close()
        assert Steady.made[-1].ends == 0
    assert running() == 5 and Steady.made[-1].ends == 1


def test_a_driver_whose_end_was_interrupted_is_ended_again(monkeypatch):
    """A second Ctrl-C: nothing of a sweep may outlive its command."""
    ends = []

    def end(driver: Steady) -> None:
        ends.append(driver)
        if len(ends) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(supervisor, "Driver", Steady)
    monkeypatch.setattr(Steady, "end", end)
    with pytest.raises(KeyboardInterrupt), Drivers(Sweep()) as drivers:
        drivers.end()
    assert len(ends) == 2 and ends[0] is ends[1]


class Aborting:
    """Work at which the driver dies as one does whose cluster died under Ray's C++."""

    params = SimpleNamespace(sweep=Sweep())

    def __reduce__(self) -> Any:
        return _abort, ()


def _abort() -> None:
    print("said by Python", file=sys.stderr)
    os.write(2, b"C [0x7f] a stack of addresses\n")
    os.abort()


def test_what_rays_library_writes_as_it_dies_is_kept_off_the_terminal(capfd):
    with Drivers(Sweep()) as drivers:
        with pytest.raises(supervisor.Lost, match=r"the driver died \(status -6\)") as lost:
            list(drivers.messages(Aborting()))
    assert "a stack of addresses" in lost.value.__notes__[0]
    terminal = capfd.readouterr().err
    assert "said by Python" in terminal and "addresses" not in terminal


class Idle:
    """Work that is never begun."""

    def run(self, tell, kept) -> None:
        raise AssertionError("begun")


def test_why_a_driver_has_ended_before_its_work_came_is_read():
    """Its cluster starts while the stage is still at its imports."""
    ended = object.__new__(supervisor.Driver)
    ended.pipe, there = multiprocessing.Pipe()
    there.send(WorkRefused(InputError("no Ray cluster answers")))
    there.close()
    with pytest.raises(InputError, match="no Ray cluster answers"):
        list(ended.messages(Idle()))


def test_a_driver_whose_supervisor_is_dead_before_its_work_begins_ends_without_a_word(monkeypatch, capfd):
    """The thread that waits for it then interrupts the driver from its first moment on."""

    class Thread:
        def __init__(self, **_) -> None: ...

        def start(self) -> None:
            raise KeyboardInterrupt

    def leaves(status: int) -> None:
        raise SystemExit(status)

    handler = signal.getsignal(signal.SIGINT)
    here, there = multiprocessing.Pipe()
    here.send(Sweep())
    here.send(Idle())
    monkeypatch.setattr(cluster, "running", lambda sweep: nullcontext())
    monkeypatch.setattr(driver.threading, "Thread", Thread)
    monkeypatch.setattr(driver, "reap", lambda mark: None)
    monkeypatch.setattr(driver.os, "_exit", leaves)
    monkeypatch.setenv(driver.MARK, "mark")
    try:
        with pytest.raises(SystemExit) as ended:
            driver.main(there)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 0 and capfd.readouterr().err == ""
