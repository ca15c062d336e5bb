"""What every verb shares: alternation, ratios with their spread, saved activations, and the record of the machine.

A ratio is measured in alternation in one process (A B A B ...): what else the machine does then falls on both sides.
Each round gives one ratio; the median of these is reported, and their quartiles as the spread.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.tracking.provenance import git_command

Work = Callable[[], Any]
Clock = Callable[[], float]
PACKAGES = ("torch", "transformers", "triton", "peft", "deepspeed", "ray", "mlflow", "dvc")


@dataclass(frozen=True)
class Rounds:
    """The seconds of each callable, round by round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds of one callable."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, over: str) -> list[float]:
        """Return `name` / `over`, one ratio a round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[over], strict=True)]

    def ratio(self, name: str, over: str) -> float:
        """Return the median of the rounds' ratios."""
        return statistics.median(self.ratios(name, over))

    def spread(self, name: str, over: str) -> list[float]:
        """Return the quartiles [first, third] of the rounds' ratios."""
        return quartiles(self.ratios(name, over))


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third quartile."""
    if len(values) == 1:
        return [values[0], values[0]]
    cut = statistics.quantiles(values, n=4, method="inclusive")
    return [cut[0], cut[2]]


def alternate(
    callables: Mapping[str, Work], repeats: int, *, warmup: int = 1, device: str = "cpu", inner: int = 1,
    clock: Clock = time.perf_counter,
) -> Rounds:  # fmt: skip
    """Time the callables in alternation.

    Args:
        callables: by name.
        repeats: rounds; every round runs each callable, and starts one further along than the round before.
        warmup: rounds that are not timed.
        device: `cuda` waits for the GPU at both ends of a timing.
        inner: runs of a callable within one timing, for work below a millisecond.
        clock: what seconds are read off; `time.thread_time` leaves out those that others had the processor, for work
            that is one thread's on a CPU.
    """
    names = list(callables)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        start = number % len(names)
        gc.collect()
        for name in names[start:] + names[:start]:
            taken = _timed(callables[name], device, inner, clock)
            if number >= warmup:
                seconds[name].append(taken)
    return Rounds(seconds)


def _timed(work: Work, device: str, inner: int, clock: Clock) -> float:
    gc.disable()
    try:
        _wait(device)
        start = clock()
        for _ in range(inner):
            work()
        _wait(device)
        return (clock() - start) / inner
    finally:
        gc.enable()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Findings:
    """Ratios and their spread as they are gathered."""

    ratios: dict[str, float] = field(default_factory=dict)
    spread: dict[str, list[float]] = field(default_factory=dict)

    def add(self, label: str, rounds: Rounds, name: str, over: str) -> None:
        """File the ratio `name` / `over` of `rounds` under `label`."""
        self.ratios[label], self.spread[label] = rounds.ratio(name, over), rounds.spread(name, over)

    def seconds(self, label: str, rounds: Rounds, name: str) -> None:
        """File the seconds of one callable under `label`."""
        self.file(label, rounds.seconds[name])

    def file(self, label: str, values: Sequence[float]) -> None:
        """File the median and the quartiles of some measurements of one thing under `label`."""
        self.ratios[label], self.spread[label] = statistics.median(values), quartiles(list(values))

    def mean(self, label: str, values: Sequence[float]) -> None:
        """File the mean and the quartiles of what some repetitions gave under `label`."""
        self.ratios[label], self.spread[label] = statistics.fmean(values), quartiles(list(values))

    def take(self, other: Findings, name: str, label: str) -> None:
        """File what another measurement found under `name` under `label`."""
        self.ratios[label], self.spread[label] = other.ratios[name], other.spread[name]

    def update(self, other: Findings) -> None:
        """Take in what another measurement found."""
        self.ratios.update(other.ratios)
        self.spread.update(other.spread)


def report(
    findings: Findings, *, device: str, method: str | None, sizes: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return what `hificl bench` prints.

    Args:
        findings: the ratios and their spread.
        device: cpu or cuda.
        method: the docstring of what was run; its part before `Args:` is printed.
        sizes: shapes, repeats, and whatever else decides a ratio.
        more: further entries, such as `growth`.
    """
    return {
        "ratios": findings.ratios, "spread": findings.spread, "sizes": dict(sizes), **more, "machine": machine(device),
        "versions": versions(), "commit": commit(), "method": " ".join((method or "").split("Args:")[0].split()),
    }  # fmt: skip


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what the numbers depend on: processor, threads, load at the end, GPU."""
    facts: dict[str, Any] = {
        "device": device, "cpu_count": os.cpu_count(), "processor": platform.processor() or platform.machine(),
        "system": platform.platform(), "python": platform.python_version(), "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts.update(gpu=properties.name, gpu_gib=properties.total_memory / 2**30, cuda=torch.version.cuda)
        facts["driver"] = _driver()
    return facts


def _driver() -> str | None:
    """Return the version of the GPU's driver, where its tool is installed."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def versions() -> dict[str, str]:
    """Return the versions of what is installed of `PACKAGES`."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """Return the commit that is measured, marked `-dirty` where code differs; None outside git."""
    root = Path(__file__).resolve().parents[2]
    code = ["--untracked-files=no", "--", "pipeline", "benchmarks/*.py"]
    try:
        head, changed = (
            subprocess.run([*git_command(root), *words], capture_output=True, text=True, check=True, timeout=20).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", *code])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("-dirty" if changed.strip() else "")


@contextmanager
def one_thread(device: str = "cpu") -> Iterator[None]:
    """Compute on one thread inside the block: what a slot of the pool has. On a GPU the threads stay as they are."""
    before = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Return the bytes that one forward pass keeps for its backward: distinct storages, the weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}  # the storages are held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(storage.nbytes() for storage in seen.values())
    del out
    return total


def main(run: Callable[..., dict[str, Any]]) -> None:
    """Run a verb and print its JSON."""
    text = getattr(run, "func", run).__doc__ or ""
    parser = argparse.ArgumentParser(description=" ".join(text.split("Args:")[0].split()))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    json.dump(run(device=parser.parse_args().device), sys.stdout, indent=1, sort_keys=True, default=str)
    sys.stdout.write("\n")
