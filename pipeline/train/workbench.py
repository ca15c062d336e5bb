"""What a resident process does: admit a trial, advance it by an epoch, drop it; and score a trained one."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from pipeline.config.load import TrialRequest
from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import InputError, WorkError
from pipeline.evaluate.generate import WHOLE, SplitPart
from pipeline.evaluate.score import Answers, answer, score
from pipeline.records.evaluation import Evaluation
from pipeline.records.trial import TrialReport
from pipeline.resident.resident import Resident
from pipeline.train.loop import TrainingLoop
from pipeline.train.trial_run import TrialRun

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def use_threads() -> None:
    """Let torch use the threads that this process was given, no more, and cuBLAS the room that fixed sums need.

    cuBLAS reads its setting once, at its first product, and a later trial may ask for fixed sums (`repeatable`).
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Let torch take algorithms alone that give equal bits from equal inputs (`train.deterministic`) inside the block.

    An operator that has none raises an error that names it.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing reads it
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def device_for(gpus: float) -> str:
    """Return where a process computes that was given this much of GPUs.

    Raises:
        InputError: it was given one, and none works: 8B parameters on a CPU would take weeks, and say nothing.
    """
    if not gpus:
        return "cpu"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"no GPU works here: {str(error).splitlines()[0]}",
            where=f"sweep.gpus_per_worker: {gpus:g}, node {socket.gethostname()}",
            way_out="See that nvidia-smi shows it and torch is a build for CUDA, or set sweep.gpus_per_worker to 0",
        ) from None
    return "cuda"


def join_group(device: str, rank: int, world_size: int, meeting: str = "", listener: int | None = None) -> None:
    """Make the process group of a slot's ranks.

    Ranks of one machine meet in a file of their owner's and talk over loopback. A rank alone needs neither; what torch
    and DeepSpeed want of a group it finds in memory.

    Args:
        device: that the ranks compute on, `cuda` or `cpu`.
        rank: this process's.
        world_size: how many ranks.
        meeting: a file's path, or `tcp://ADDRESS:PORT` where the ranks lie on several machines; no matter for one rank.
        listener: descriptor of the first rank's socket, which listens at that address alone and is taken over.
    """
    store: torch.distributed.Store
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    address = urlsplit(meeting)
    if address.scheme != "tcp":
        os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _LOOPBACK)
    if world_size == 1:
        store = torch.distributed.HashStore()
    elif address.scheme != "tcp":
        store = torch.distributed.FileStore(meeting, world_size)
    else:
        host, port = str(address.hostname), int(address.port or 0)
        store = torch.distributed.TCPStore(host, port, world_size, rank == 0, master_listen_fd=listener)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)


class Stopped(Exception):
    """Training was to end; all that it had done up to its last step is kept."""


class Workbench:
    """Trains trials, one or several together, with the backbone resident.

    Args:
        device: where models go; None: a GPU if there is one.
        batch_size: prompts generated at once.
    """

    def __init__(self, device: str | None = None, batch_size: int = 64) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size
        self._resident: Resident | None = None  # one: an 8B backbone fills a GPU
        self.loop: TrainingLoop | None = None
        self.steps = 0  # counts up while work goes on
        self.stopping = False  # set by a signal's handler: ends training behind the next step, which is kept

    def resident(self, request: TrialRequest) -> Resident:
        """Return the resident backbone of a trial, loading it if another one or none is held.

        Raises:
            WorkError: another one is in training.
        """
        config = request.config
        if self._resident is None or self._resident.key != Resident.key_of(config):
            if self.loop is not None and self.loop.trials:
                raise WorkError("another backbone is in training here", where=request.key)
            self._resident = self.loop = None  # before the next one is loaded, which needs the room
            gc.collect()  # a model's modules refer to one another
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            cache = Path(request.cache) if request.cache else None
            self._resident = Resident(config, request.source, cache, self.device)
        return self._resident

    def admit(self, request: TrialRequest) -> int:
        """Take a trial up at its last checkpoint, beside those that are admitted; return the epochs behind it.

        Raises:
            WorkError: it cannot train together with those that are admitted (`TrialRequest.pack_key` differs).
        """
        resident = self.resident(request)
        if self.loop is None:
            self.loop = TrainingLoop(resident, self._count)
        self.evict(request.key)
        manifest = resident.manifest(request)
        folder, keep = Path(request.folder), request.keep_seconds
        run = TrialRun(request.config, folder, resident, manifest, request.kinds, keep, request.compared_after)
        self.loop.trials.append(run)
        return run.epochs_done

    def advance(self) -> list[TrialReport]:
        """Train the admitted trials until one of them has something to report; see `TrainingLoop.advance`.

        Raises:
            Stopped: `stopping` was set meanwhile.
        """
        if self.loop is None or not self.loop.trials:
            return []
        with repeatable(self.loop.trials[0].config.deterministic):  # which those of a pack share
            return self.loop.advance()

    def room(self) -> int:
        """Return how many trials may join those that are admitted."""
        return self.loop.room() if self.loop is not None else 0

    @property
    def why_room(self) -> str:
        """Why so many, in a line."""
        return self.loop.why_room if self.loop is not None else ""

    def evict(self, key: str) -> None:
        """Drop the trial `key`."""
        if self.loop is not None:
            self.loop.evict(key)

    def _count(self) -> None:
        self.steps += 1
        if self.loop is None:
            return
        trials = self.loop.trials
        if (self.stopping and all(trial.world == 1 for trial in trials)) or any(trial.leaving for trial in trials):
            self.loop.keep(trials)
            raise Stopped
        for trial in trials:  # several ranks hear of it at different steps: behind the next one they agree
            trial.asked = self.stopping

    def score(self, request: TrialRequest, evaluation: EvaluationConfig) -> Evaluation:
        """Let a trial answer a split and score it."""
        return self.finish(request, evaluation, self.answer([request], evaluation))

    def answer(
        self, requests: Sequence[TrialRequest], evaluation: EvaluationConfig, part: SplitPart = WHOLE,
        on_batch: Callable[[], None] = lambda: None,
    ) -> list[Answers]:  # fmt: skip
        """Let trials answer a part of a split; see `evaluate.score.answer`."""
        with repeatable(requests[0].config.deterministic):
            return answer(self.resident(requests[0]), requests, evaluation, part, self.batch_size, on_batch)

    def finish(self, request: TrialRequest, evaluation: EvaluationConfig, parts: Sequence[Answers]) -> Evaluation:
        """Score a trial that has answered all parts; see `evaluate.score.score`."""
        return score(self.resident(request), request, evaluation, parts)
