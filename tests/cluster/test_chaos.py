"""Something is killed every 15 s on a cluster of namespaces; the store is that of an undisturbed sweep.

Ray, on head and workers, and the MLflow server are services that are started again when they end. The sweep is started
again by its command whenever it has ended, as a user would. No limit of Ray's or of the sweep's is changed.
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lab import HERE, Lab, Machine, missing
from tests.conftest import ROOT
from tests.faults.checks import mlflow_problems, results, steps_trained
from tests.faults.sweeps import STEPS, Sweep, make_sweep, set_sweep
from tests.faults.table import publish

MINUTES = float(os.environ.get("HIFICL_CHAOS_MINUTES") or 20)
SEED = int(os.environ.get("HIFICL_CHAOS_SEED") or 1)
OPEN, CLOSE = "<!-- chaos: written by `make test-chaos TABLE=docs/faults.md` -->", "<!-- end of the chaos -->"
KILL_SECONDS = 15.0
REST_SECONDS = 3600.0  # for what is left when nothing is killed any more
EPOCHS = 10
TRIALS_A_MINUTE = 5.0  # more than two slots train beside the kills, so that there is work until the last one
PORT = 6379
SWEEP = ("-m", "pipeline", "sweep")
KINDS = {  # which processes are of a kind, by their command lines
    "worker": "ray::Worker",
    "raylet": "/raylet/raylet ",
    "head": "/gcs_server ",
    "driver": "pipeline.pool.driver",
    "stage": " ".join(SWEEP),
    "tracking server": "mlflow",
}

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(int(MINUTES * 120 + 2 * REST_SECONDS)),
    pytest.mark.skipif(missing() is not None, reason=f"no cluster of namespaces: {missing()}"),
]


class Site:
    """The machines of a cluster, what runs on them as services, and the sweep that somebody starts again and again."""

    def __init__(self, lab: Lab, sweep: Sweep) -> None:
        self.lab, self.sweep = lab, sweep
        lab.cwd = sweep.folder
        self.steps = lab.folder / "steps"
        self.steps.mkdir()
        sweep.runs.mkdir()
        lab.share()
        self.head, *self.workers = self.machines = [lab.machine(name) for name in ("head", "worker-1", "worker-2")]
        for machine in self.machines:
            machine.mount(sweep.runs)
            (machine.home / ".ray").mkdir()
            (machine.home / ".ray/auth_token").write_text("ab" * 32)
            (machine.home / ".ray/auth_token").chmod(0o600)
        address = f"{self.head.address}:{PORT}"
        self._serve(self.head, *SERVER)
        self._serve(self.head, *ray(self.head, "--head", "--include-dashboard=false", f"--port={PORT}", "--num-cpus=0"))
        for machine in self.workers:
            self._serve(machine, *ray(machine, f"--address={address}", "--num-cpus=1"))
        set_sweep(sweep, address=address)
        self.stage: Any = None
        self.ended: list[int] = []  # how the sweep's command ended, each time

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(HERE / "counting"), str(ROOT), os.environ.get("PYTHONPATH")]))
        return {"RAY_AUTH_MODE": "token", "RAY_enable_metrics_collection": "0", "PYTHONPATH": path,
                "HIFICL_STEPS": str(self.steps), "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}  # fmt: skip

    def _serve(self, machine: Machine, *words: str) -> None:
        """Run a command as a service, which is started again when it ends."""
        loop = f"while :; do {shlex.join(words)}; sleep 1; done"
        machine.start("bash", "-c", loop, log=machine.folder / "services.log", **self.environment)

    @property
    def log(self) -> Path:
        return self.lab.folder / "sweep.log"

    def keep_going(self) -> bool:
        """Start the sweep where it does not run; return whether it has ended well."""
        if 0 in self.ended:
            return True
        if self.stage is not None and (status := self.stage.poll()) is not None:
            self.ended.append(status)
            self.stage = None
            return status == 0
        if self.stage is None:
            self.stage = self.head.start(sys.executable, *SWEEP, log=self.log, **self.environment)
        return False

    def running(self) -> list[tuple[str, Machine, list[int]]]:
        """Return what may be killed now, with its kind: each process for itself, but all of the MLflow server's."""
        found = []
        for machine in self.machines:
            lines = {pid: f"{line} " for pid, line in machine.processes().items() if "while :; do" not in line}
            for kind, words in KINDS.items():
                pids = sorted(pid for pid, line in lines.items() if words in line)
                groups = [pids] if kind == "tracking server" else [[pid] for pid in pids]
                found += [(kind, machine, group) for group in groups if group]
        return found

    def kept(self) -> int:
        """Return the steps of the epochs that the store holds."""
        return STEPS * sum(path.read_bytes().count(b"\n") for path in self.sweep.runs.glob("*/metrics.jsonl"))


SERVER = (sys.executable, "-m", "pipeline", "tracking-server")


def ray(machine: Machine, *words: str) -> list[str]:
    """Return the command of a service that is a node."""
    program = str(Path(sys.executable).with_name("ray"))
    return [program, "start", "--block", "--disable-usage-stats", "--num-gpus=0",
            "--object-store-memory=100000000", f"--node-ip-address={machine.address}", *words]  # fmt: skip


@dataclass
class Run:
    """What a run of chaos has seen."""

    kills: list[str] = field(default_factory=list)
    seconds: float = 0.0
    kept: int = 0  # steps in the store when the killing ended
    closed: dict[str, int] = field(default_factory=dict)  # when each trial was closed, by its file's time

    def note_ends(self, sweep: Sweep) -> None:
        """Note the ends that are there; an end of a trial that finished stays."""
        for key, end in sweep.ends().items():
            if end["status"] == "finished":
                at = (sweep.runs / key / "done.json").stat().st_mtime_ns
                assert self.closed.setdefault(key, at) == at, f"{key} was closed twice"


@pytest.fixture
def site(tmp_path: Path):
    sweep = make_sweep(tmp_path / "sweep")
    rates = [round(0.01 * 1.05**number, 5) for number in range(max(2, round(MINUTES * TRIALS_A_MINUTE / 3)))]

    def edit(raw: dict[str, Any]) -> None:
        raw["studies"]["small"]["methods"] = {
            "hificl": {"search": {"learning_rate": rates}},
            "live": {"search": {"learning_rate": rates}},
            "lora": {"method": "lora", "rank": 2, "search": {"learning_rate": rates}},
        }
        raw["profiles"]["tiny"]["train"]["epochs_below_1000"] = EPOCHS
        raw["profiles"]["tiny"]["sweep"].update(slots=2)

    sweep.change(edit)
    (tmp_path / "lab").mkdir()
    lab = Lab(tmp_path / "lab")
    try:
        yield sweep, lambda: Site(lab, sweep)
    finally:
        lab.close()


def test_the_store_is_that_of_an_undisturbed_sweep(site, tmp_path):
    sweep, build = site
    reference = sweep.copy(tmp_path / "reference")
    started = time.monotonic()
    reference.begin()
    assert reference.ended(REST_SECONDS) == 0, reference.log
    undisturbed = time.monotonic() - started
    wanted = results(reference)
    assert {row["status"] for row in wanted.values()} == {"finished"}

    cluster = build()
    run = disturb(cluster)
    deadline = time.monotonic() + REST_SECONDS
    while not cluster.keep_going():
        assert time.monotonic() < deadline, cluster.log.read_text()[-6000:]
        run.note_ends(sweep)
        time.sleep(1)
    run.note_ends(sweep)

    found = results(sweep)
    assert found.keys() == wanted.keys()  # none is lost, none is there that was not asked for
    assert {key: row for key, row in found.items() if row != wanted[key]} == {}
    assert adapters(sweep) == adapters(reference)
    database = cluster.head.home / ".hificl/tracking/mlflow.db"
    assert mlflow_problems(database, dict.fromkeys(wanted, "FINISHED"), EPOCHS) == []
    trained = steps_trained(cluster.steps)
    steps = STEPS * EPOCHS * len(wanted)
    assert len(trained) == steps
    assert "Traceback" not in cluster.log.read_text()
    tell(cluster, run, trained, steps / undisturbed)


def disturb(cluster: Site) -> Run:
    """Kill something every 15 s until the time is over, and have the sweep started again where it ended."""
    run, draw = Run(), random.Random(SEED)
    while not cluster.sweep.events("slot built"):  # from its first slot on
        assert not cluster.keep_going()
        time.sleep(1)
    started = time.monotonic()
    end, next_kill = started + 60 * MINUTES, started + KILL_SECONDS
    while time.monotonic() < end and not cluster.keep_going():
        if time.monotonic() >= next_kill:
            next_kill += KILL_SECONDS
            kind, machine, pids = draw.choice(cluster.running())
            for pid in pids:
                with suppress(ProcessLookupError):  # it ended by itself in between
                    os.kill(pid, signal.SIGKILL)
            run.kills.append(kind)
            seen = f"{cluster.kept()} steps kept, {len(run.closed)} trials ended, {len(cluster.ended)} starts over"
            print(f"{time.monotonic() - started:6.0f} s  {kind} on {machine.name}; {seen}", flush=True)
        run.note_ends(cluster.sweep)
        time.sleep(0.5)
    run.note_ends(cluster.sweep)
    run.seconds, run.kept = time.monotonic() - started, cluster.kept()
    return run


def adapters(sweep: Sweep) -> dict[str, bytes]:
    """Return every file of every trial's adapter."""
    files = (file for file in sweep.runs.glob("*/adapter/**/*") if file.is_file())
    return {str(file.relative_to(sweep.runs)): file.read_bytes() for file in files}


def tell(cluster: Site, run: Run, trained: Counter[str], undisturbed: float) -> None:
    """Publish what was killed, and what came of it."""
    total = trained.total()
    goodput = run.kept / run.seconds
    kinds = Counter(run.kills)
    rows = {
        "seconds of killing": f"{run.seconds:.0f}",
        "killed": f"{len(run.kills)}: " + ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS),
        "fault rate": f"{60 * len(run.kills) / run.seconds:.1f} a minute",
        "the sweep's command was started": f"{len(cluster.ended)} times",
        "goodput: steps in the store per second": f"{goodput:.2f}, undisturbed on one machine {undisturbed:.2f}",
        "steps that were lost, and trained again": f"{total - len(trained)} of {len(trained)}",
        "trials": f"{len(run.closed)}; 0 lost, 0 doubled, all equal to the undisturbed ones to the bit",
    }
    lines = ["| what | seen |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    record = {
        "seed": SEED, "kills": dict(kinds), "seconds": run.seconds, "kept": run.kept, "trained": total,
        "distinct": len(trained), "undisturbed_steps_per_second": undisturbed, "ends": cluster.ended,
    }  # fmt: skip
    publish(OPEN, CLOSE, lines, "chaos-cpu.json", record)
    print("\n".join(f"{name}: {value}" for name, value in rows.items()))
