"""A small sweep on the miniature, and what can be done to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline.records.journal import Journal
from tests.conftest import ROOT
from tests.e2e.conftest import Project

MARK = "HIFICL_FAULT"
EPOCHS = 3
STEPS = 4  # of an epoch
STUDY = {
    "title": "A sweep that is disturbed", "backbones": ["idefics2-8b-base"], "tasks": ["vqav2"],
    # a teacher, demonstrations that are drawn anew, dropout, and the method without either
    "methods": {"hificl": {"search": {"rank": [1, 2]}}, "live": None, "lora": {"method": "lora", "rank": 2}},
}  # fmt: skip


class Sweep(Project):
    """A workspace, and the processes that were started in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark}
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        self.seen_done: dict[str, int] = {}
        self.stage: subprocess.Popen | None = None

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def log(self) -> str:
        return (self.folder / "started.log").read_text()

    def copy(self, folder: Path) -> Sweep:
        shutil.copytree(self.folder, folder, symlinks=True)
        return Sweep(folder)

    # -- running -------------------------------------------------------------------------------------------------------

    def begin(self, *words: str, log: str = "started.log", **environment: str) -> subprocess.Popen:
        with (self.folder / log).open("w") as file:
            self.stage = subprocess.Popen(
                [sys.executable, *(words or ("-m", "stages.train"))], cwd=self.folder, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, env={**self.environment, **environment},
            )  # fmt: skip
        return self.stage

    def ended(self, seconds: float = 300) -> int:
        """Wait for the stage; return its status."""
        assert self.stage is not None
        try:
            return self.stage.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the stage does not end:\n{self.log[-3000:]}") from None

    def again(self, *words: str, **environment: str) -> None:
        """Run the stage to its good end."""
        self.begin(*words, **environment)
        assert self.ended() == 0, self.log[-4000:]

    def until(self, true: Callable[[], Any], what: str, seconds: float = 240) -> Any:
        """Wait until `true` gives something, which is returned; the stage must be running."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = true()
            if found:
                return found
            assert self.stage is None or self.stage.poll() is None, f"ended before {what}:\n{self.log[-4000:]}"
            time.sleep(0.02)
        raise AssertionError(f"{what} did not come within {seconds:.0f} s:\n{self.log[-4000:]}")

    def midway(self) -> None:
        """Wait until a trial is done and another has an epoch behind it."""

        def true() -> bool:
            ends = set(self.ends())
            return bool(ends) and any(
                path.parent.parent.parent.name not in ends for path in self.runs.glob("*/checkpoint/epoch-*/state.json")
            )

        self.until(true, "a done trial and one with an epoch")
        self.remember()

    def held_at(self, epochs: int) -> bool:
        """Stop the worker while a trial is done and an open one has so many epochs; whether that was possible."""
        assert self.stage is not None

        def true() -> bool:
            ends, kept = set(self.ends()), self.runs.glob("*/checkpoint/epoch-*/state.json")
            behind = Counter(path.parent.parent.parent.name for path in kept)
            return bool(ends) and any(count >= epochs for key, count in behind.items() if key not in ends)

        while self.stage.poll() is None:
            if true():
                for worker in self.workers():
                    os.kill(worker, signal.SIGSTOP)
                if true():  # still: between the look and the signal the trial may have ended
                    return True
                for worker in self.workers():
                    os.kill(worker, signal.SIGCONT)
            time.sleep(0.01)
        return False

    def remember(self) -> None:
        """Note when each finished trial was finished: none may be touched again."""
        ends = self.ends()
        done = {path.parent.name: path.stat().st_mtime_ns for path in self.runs.glob("*/done.json")}
        self.seen_done = {key: at for key, at in done.items() if ends.get(key, {}).get("status") == "finished"}

    # -- what is there -------------------------------------------------------------------------------------------------

    def ends(self) -> dict[str, dict[str, Any]]:
        found = {}
        for path in self.runs.glob("*/done.json"):
            found[path.parent.name] = json.loads(path.read_text())
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        rows = Journal(self.runs, whole=True).news()
        return [{"time": row.time, **row.facts} for row in rows if row.event == name]

    def workers(self) -> list[int]:
        """Process ids of the newest slot's workers."""
        built = self.events("slot built")
        return built[-1]["pids"] if built else []

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Processes that descend from what was started here, whose command line holds `part`."""
        return [one for one in marked(self.mark) if part in " ".join(cmdline(one))]

    def kill(self, part: str, how: int = signal.SIGKILL) -> float:
        """Send a signal to all processes of a kind; return when (seconds since 1970)."""
        found = self.processes(part)
        assert found, f"no process {part}"
        for process in found:
            process.send_signal(how)
        return time.time()

    def clean_up(self) -> None:
        while left := self.processes():
            for process in left:
                process.kill()
            time.sleep(0.1)


def marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# -- making one ------------------------------------------------------------------------------------------------------


def make_sweep(folder: Path) -> Sweep:
    """A workspace with four trials of three epochs on a small world, manifests drawn."""
    from pipeline.workspace import make_workspace

    before = Path.cwd()
    os.chdir(ROOT)
    try:
        make_workspace(folder, profile="mini")
    finally:
        os.chdir(before)
    made = Sweep(folder)

    def edit(raw: dict[str, Any]) -> None:
        raw["studies"] = {"small": STUDY}
        raw["profile"] = "tiny"
        raw["profiles"]["tiny"] = {**raw["profiles"]["mini"], "study_changes": {}}
        raw["profiles"]["tiny"].update(
            studies=["small"], tasks=["mini-vqa"], backbones=["mini-idefics2"], methods={},
            sweep={"pack": 1, "slots": 1},
            subsample={"num_train": 16, "num_selection": 8, "num_evaluation": 8},
            train={
                "num_train_samples": 16, "num_selection_samples": 8, "micro_batch_size": 4, "accumulation": 1,
                "epochs_below_1000": EPOCHS, "num_shots": 2, "selection_metric": "loss",
            },
        )  # fmt: skip
        raw["miniature"].update(num_train_images=60, num_val_images=20)
        raw["tracking"]["system_metrics"] = False

    made.change(edit)
    # the store's tables, which a sweep would take seconds to make
    tables = f"from pipeline.tracking.client import Tracker; Tracker('sqlite:///{folder}/mlflow.db', '.').prepare([])"
    for words in (("-m", "stages.world"), ("-m", "stages.subsample", "mini-vqa"), ("-c", tables)):
        made.python(*words)
    return made


def set_sweep(sweep: Sweep, **values: Any) -> None:
    sweep.change(lambda raw: raw["profiles"]["tiny"]["sweep"].update(values))


def set_tracking(sweep: Sweep, **values: Any) -> None:
    sweep.change(lambda raw: raw["tracking"].update(values))
