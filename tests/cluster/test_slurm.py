"""A sweep under a real SLURM: tasks lease trials, are signalled, requeued, preempted and run out of time.

And one whose trial spans two nodes, each a machine of the lab's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster import lab
from tests.cluster.lab import HERE, Lab, Machine
from tests.cluster.slurm import Slurm, missing
from tests.conftest import ROOT
from tests.faults.checks import mlflow_problems, results, steps_trained
from tests.faults.sweeps import EPOCHS, STEPS, Sweep, make_sweep
from tests.faults.table import publish

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(missing() is not None, reason=f"no SLURM here: {missing()}"),
]


MARKS = "<!-- slurm, {}: written by `make test-slurm TABLE=docs/faults.md` -->", "<!-- end of slurm, {} -->"


def tell(name: str, rows: list[tuple[str, float, int]], counts: Counter[str]) -> None:
    """Publish what was done to tasks: how long until the trial was taken up again, and the steps that were kept."""
    again = sum(counts.values()) - len(counts)
    lines = ["| what | trains again after | steps kept |", "|---|---|---|"]
    lines += [f"| {what} | {seconds:.1f} s | {kept} |" for what, seconds, kept in rows]
    lines += ["", f"Of {len(counts)} steps, {again} were trained again; the numbers are those of an undisturbed sweep."]
    record = {"rows": rows, "steps": len(counts), "again": again}
    publish(*(mark.format(name) for mark in MARKS), lines, f"slurm-{name.replace(' ', '-')}-cpu.json", record)


@pytest.fixture
def system(tmp_path_factory):
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    yield made
    made.close()


class Submitted:
    """A job of a workspace."""

    def __init__(self, sweep: Sweep, system: Slurm, *words: str) -> None:
        self.sweep, self.system = sweep, system
        sweep.environment |= system.environment
        command = system.on(0, sys.executable, "-m", "pipeline", "submit", "slurm", "--json", *words)
        done = subprocess.run(
            command, cwd=sweep.folder, env=sweep.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        self.answer = json.loads(done.stdout)
        self.job = self.answer["job"]

    @property
    def logs(self) -> str:
        return "".join(file.read_text() for file in sorted((self.sweep.runs / ".slurm").glob("*.log")))

    def caught(self, seconds: float = 400) -> tuple[int, str]:
        """Stop a task's process within an epoch of its trial; return its id and the task."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for pid in {
                int(re.match(r"pid (\d+)", event["by"])[1]) for event in self.sweep.events("trial leased")[-2:]
            }:
                if not self.within_an_epoch(pid):
                    continue
                try:
                    os.kill(pid, signal.SIGSTOP)
                    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                except (ProcessLookupError, FileNotFoundError):
                    continue
                if self.within_an_epoch(pid):  # still: it may have gone on before the signal
                    number = next(value.partition("=")[2] for value in environment if "SLURM_ARRAY_TASK_ID" in value)
                    return pid, f"{self.job}_{number}"
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.005)
        raise AssertionError(f"no task trains: {self.system.ask('squeue')}{self.logs[-4000:]}")

    def within_an_epoch(self, pid: int) -> bool:
        """Whether a process has trained a step of an epoch, and has one to train beside the one that it may be at."""
        noted = self.sweep.folder / "steps" / str(pid)
        lines = noted.read_text().splitlines() if noted.exists() else []
        if not lines:
            return False
        trial, step = lines[-1].split()
        return int(step) % STEPS < STEPS - 2 and trial == self.leased(pid)[-1] and trial not in self.sweep.ends()

    def go_on(self, pid: int, task: str, number: int) -> float:
        """Let a stopped process go on once SLURM's signal has reached it; wait until its task is in the queue again.

        Returns:
            When the process was gone, as a journal has times.
        """

        def pending() -> bool:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except FileNotFoundError:
                return True
            shown = re.search(r"ShdPnd:\s*(\w+)", status)
            stopped = re.search(r"State:\s*T", status)
            return stopped is None or bool(int(shown[1], 16) >> (number - 1) & 1)

        self.system.until(pending, f"{signal.Signals(number).name} for task {task}")
        os.kill(pid, signal.SIGCONT)
        self.system.until(lambda: not Path(f"/proc/{pid}").exists(), f"end of pid {pid}")
        gone = time.time()
        self.system.until(lambda: "PENDING" in self.system.state(task) or self.restarts(task), f"requeueing of {task}")
        return gone

    def minutes(self, task: str) -> int:
        """Return how many whole minutes a task has run."""
        hours, minutes = re.search(
            r"RunTime=(\d+):(\d+):", self.system.ask("scontrol", "show", "job", "-o", task)
        ).groups()
        return 60 * int(hours) + int(minutes)

    def restarts(self, task: str) -> int:
        return int(re.search(r"Restarts=(\d+)", self.system.ask("scontrol", "show", "job", "-o", task))[1])

    def kept(self) -> set[Path]:
        return set(self.sweep.runs.glob("*/checkpoint/epoch-*-step-*"))

    def leased(self, pid: int) -> list[str]:
        """Return the trials that a process has leased, in order."""
        return [e["trial"] for e in self.sweep.events("trial leased") if e["by"].startswith(f"pid {pid} ")]

    def leases(self, trial: str) -> list[float]:
        """Return when a trial was leased."""
        return [event["time"] for event in self.sweep.events("trial leased") if event["trial"] == trial]


def counting(sweep: Sweep, system: Slurm) -> None:
    """Have each step noted that a process of the sweep trains."""
    (sweep.folder / "steps").mkdir()
    system.environment |= {"PYTHONPATH": f"{HERE / 'counting'}:{ROOT}", "HIFICL_STEPS": str(sweep.folder / "steps")}


def test_a_sweep_of_leased_trials_survives_signals_requeueing_preemption_and_time_limits(tmp_path, system):
    sweep = make_sweep(tmp_path / "template")
    reference = sweep.copy(tmp_path / "reference")
    reference.again()
    wanted = results(reference)
    assert len(wanted) == 4 and {row["status"] for row in wanted.values()} == {"finished"}

    counting(sweep, system)
    job = Submitted(sweep, system, "--tasks", "2", "--time", "00:20:00", "--grace", "60")
    assert (job.answer["open"], job.answer["tasks"]) == (4, 2)
    rows = []
    for name, disturb, number in (
        ("requeued: `scontrol requeue` (TERM)", lambda task: ("scontrol", "requeue", task), signal.SIGTERM),
        (
            "its time limit (USR1 60 s before)",
            lambda task: ("scontrol", "update", f"JobId={task}", f"TimeLimit={job.minutes(task) + 2}"),
            signal.SIGUSR1,
        ),
        (
            "preempted by a job of a higher partition (TERM)",
            lambda _: ("sbatch", "-p", "high", "-n2", "--wrap", "sleep 1", "-o", "/dev/null"),
            signal.SIGTERM,
        ),
    ):
        pid, task = job.caught()
        before, kept, trial = job.restarts(task), job.logs.count("the last step is kept"), job.leased(pid)[-1]
        leased = len(job.leases(trial))
        system.ask(*disturb(task), cwd=sweep.folder)
        gone = job.go_on(pid, task, number)
        kept = job.logs.count("the last step is kept") - kept
        system.until(lambda task=task, before=before: job.restarts(task) > before, "a restart")
        if number == signal.SIGUSR1:
            system.ask("scontrol", "update", f"JobId={task}", "TimeLimit=20")
        while len(job.leases(trial)) == leased:
            assert time.time() < gone + 300, f"nobody goes on with {trial}: {job.logs[-4000:]}"
            time.sleep(0.1)
        rows.append((name, max(0.0, job.leases(trial)[leased] - gone), kept))
    system.until(lambda: len(sweep.ends()) == 4, "the end of all trials", 600)
    system.until(lambda: not system.ask("squeue", "-h").strip(), "the end of all tasks", 300)

    assert results(sweep) == wanted
    epochs = re.findall(r"^(\w{16}): epoch (\d+)", job.logs, re.MULTILINE)
    assert sorted(epochs) == sorted((key, str(epoch)) for key in wanted for epoch in range(1, EPOCHS + 1))  # each once
    assert [kept for _, _, kept in rows] in ([1, 1, 1], [1, 1, 2]), job.logs  # the last takes both tasks' places
    assert job.logs.count("the last step is kept") >= 3
    assert "SIGUSR1: the last step is kept" in job.logs and "is back in the queue" in job.logs

    sweep.again("-m", "pipeline", "sweep")  # brings MLflow in line, and trains nothing
    assert mlflow_problems(sweep.folder / "mlflow.db", dict.fromkeys(wanted, "FINISHED")) == []
    assert results(sweep) == wanted and not list(sweep.runs.glob("*/checkpoint/*-step-*"))
    counts = steps_trained(sweep.folder / "steps")
    assert len(counts) == len(wanted) * EPOCHS * STEPS
    tell("array", rows, counts)


def test_what_is_cancelled_keeps_its_step_and_stays_cancelled(tmp_path, system):
    sweep = make_sweep(tmp_path / "sweep")
    counting(sweep, system)
    job = Submitted(sweep, system, "--tasks", "1", "--sbatch=--comment=two words")
    pid, task = job.caught()
    assert "Comment=two words" in system.ask("scontrol", "show", "job", "-o", task)
    system.ask("scancel", task)
    system.until(lambda: "CANCELLED" in system.state(task) or "COMPLETING" in system.state(task), "cancelling")
    os.kill(pid, signal.SIGCONT)
    system.until(lambda: not Path(f"/proc/{pid}").exists(), "end of the process")
    system.until(lambda: "CANCELLED" in system.state(task), "the end of the task")
    time.sleep(3)
    assert "CANCELLED" in system.state(task) and job.restarts(task) == 0
    assert "SIGTERM: the last step is kept" in job.logs and len(sweep.ends()) < 4
    assert sys.executable in (sweep.runs / ".slurm/array.sh").read_text()


LONGER = 2 * EPOCHS
TWO_RANKS = {"method": "hificl", "rank": 2, "micro_batch_size": 2, "accumulation": 1, "world_size": 2, "zero_stage": 2}


@pytest.fixture
def machines(tmp_path_factory):
    if (why := lab.missing()) is not None:
        pytest.skip(f"no machines: {why}")
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield [made.machine("node-1"), made.machine("node-2")]
    made.close()


def listening(head: Machine, other: Machine) -> None:
    """What is to listen on a cluster: nothing beyond loopback that answers without a token."""
    sockets = head.listening()
    assert {host for host, port in sockets if port == 8265} == {"127.0.0.1"}  # the dashboard
    everywhere = {port for host, port in sockets if host in ("0.0.0.0", "::")}
    assert any(20000 <= port < 30000 for port in everywhere), everywhere  # Ray's GCS, which gRPC gives no address
    for port in everywhere:
        asked = other.run("curl", "-s", "-m", "5", "--http1.1", f"http://{head.address}:{port}/metrics", check=False)
        assert asked.returncode, f"port {port} answers everybody: {asked.stdout[:300]}"


def test_a_trial_over_two_nodes_keeps_its_step_is_requeued_and_ends_as_on_one_machine(tmp_path, machines):
    sweep = make_sweep(tmp_path / "template")

    def edit(raw):
        raw["profiles"]["tiny"]["train"]["epochs_below_1000"] = LONGER
        raw["studies"]["small"]["methods"] = {"two": TWO_RANKS}

    sweep.change(edit)
    reference = sweep.copy(tmp_path / "reference")
    reference.again()
    wanted = results(reference)
    assert [(row["status"], len(row["rows"])) for row in wanted.values()] == [("finished", LONGER)]

    machines[0].lab.cwd = sweep.folder
    folder = tmp_path / "slurm"
    folder.mkdir()
    system = Slurm(folder, machines)
    (folder / "home").mkdir()
    counting(sweep, system)
    system.environment |= {"HOME": str(folder / "home"), "RAY_TMPDIR": "/tmp/ray"}  # each machine has one of its own
    try:
        rows = spans_nodes(sweep, system, machines)
    finally:
        system.close()
    assert results(sweep) == wanted
    assert mlflow_problems(sweep.folder / "mlflow.db", dict.fromkeys(wanted, "FINISHED"), LONGER) == []
    tell(
        "two nodes", rows, Counter({step: count // 2 for step, count in steps_trained(sweep.folder / "steps").items()})
    )


def spans_nodes(sweep: Sweep, system: Slurm, machines: list[Machine]) -> list[tuple[str, float, int]]:
    """Let a job of two nodes train, be told to end, be requeued, and come to its end; return the rows of the table."""
    job = Submitted(sweep, system, "--nodes", "2", "--time", "00:20:00")
    assert (job.answer["nodes"], job.answer["open"]) == (2, 1)

    def running(machine: Machine, name: str) -> list[int]:
        return [pid for pid, line in machine.processes().items() if name in line]

    def steps() -> Counter[int]:
        """How often each step was trained, by any rank."""
        return Counter({int(line.split()[1]): count for line, count in steps_trained(sweep.folder / "steps").items()})

    def goes_on(what: str, rank: int) -> None:
        """Let a stopped rank hear of its end, and wait until the restarted job trains."""
        kept, at = job.kept(), time.monotonic()
        os.kill(rank, signal.SIGCONT)
        system.until(lambda: job.restarts(job.job) == len(rows) + 1, "a restart")
        new, before = len(job.kept() - kept), steps().total()
        system.until(lambda: steps().total() > before or bool(sweep.ends()), "a step", 400)
        rows.append((what, time.monotonic() - at, new))

    rows: list[tuple[str, float, int]] = []

    def caught(step: int) -> int:
        """Stop a rank early in an epoch, with so many steps behind it: then the other waits for it."""
        end = time.monotonic() + 400
        while not [at for at in steps() if at >= step and at % STEPS == 0]:
            assert time.monotonic() < end, job.logs + system.logs()
            time.sleep(0.005)
        (rank,) = running(machines[1], "ray::Worker")
        os.kill(rank, signal.SIGSTOP)
        assert not sweep.ends(), "it was caught too late"
        return rank

    rank = caught(STEPS)
    assert len(running(machines[0], "ray::Worker")) == 1
    listening(*machines)
    system.ask("scancel", "--signal=USR1", "--batch", job.job)  # as before a time limit
    system.until(lambda: running(machines[0], "ray::Dispatcher.close"), "the end of the sweep's driver")
    time.sleep(3)  # until the rank that is not stopped has heard of it
    goes_on("its time limit (USR1)", rank)
    assert rows[0][2] == 1, job.logs
    rank = caught(3 * STEPS)
    counts = steps()
    assert {count for step, count in counts.items() if step < max(counts)} == {2}, "a step was trained again"
    system.ask("scontrol", "requeue", job.job)  # TERM to every process
    system.until(lambda: "RUNNING" not in system.state(job.job), "the requeueing")
    goes_on("requeued: `scontrol requeue` (TERM)", rank)
    system.until(lambda: "COMPLETED" in system.state(job.job), "the end of the job", 400)
    for machine in machines:
        assert not running(machine, "raylet"), machine.processes()
    return rows
