"""A worker of `hificl bench cuda`: goes through a list of items, writes a line for every number, survives failures.

`python -m benchmarks.support.lease --lines FILE --until TIME ITEM ...` is started by `benchmarks.cuda`, which starts
another one where this process ends early: a kernel that fails takes its process's CUDA context with it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cuda import ITEMS, NO_DEVICE, Item
from benchmarks.support.timing import Rounds, alternate, commit, machine, quartiles, versions

if TYPE_CHECKING:
    from benchmarks.support.shapes import Bench

BROKEN = 3  # exit status: the device answers no more in this process
_TRACEBACK_LINES = 6


@dataclass
class Lease:
    """What items share: the device, the time, the model that is loaded, and where lines go.

    Attributes:
        device: cuda, or cpu for a rehearsal in tiny sizes.
        lines: the file that a line is appended to for every number.
        until: when the last item must have ended, in seconds since the epoch.
        item: the one that runs.
    """

    device: str
    lines: Path
    until: float = math.inf
    item: str = ""
    _bench: tuple[str, Bench] | None = None
    _ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def rehearses(self) -> bool:
        """Whether sizes are tiny."""
        return self.device != "cuda"

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.time()

    def write(self, **entry: Any) -> None:
        """Append one line, at once, and show it."""
        if self.item:
            entry = {"item": self.item, **entry}
        text = json.dumps(entry, default=str)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
        if shown := _shown(entry):
            sys.stderr.write(shown + "\n")
            sys.stderr.flush()

    def number(self, name: str, value: float, spread: Sequence[float] | None = None, **facts: Any) -> None:
        """Write a number down."""
        self.write(name=name, value=float(value), spread=list(spread or (value, value)), **facts)

    def ratio(self, name: str, rounds: Rounds, of: str, over: str) -> None:
        """Write down what `of` takes over `over`."""
        self.number(name, rounds.ratio(of, over), rounds.spread(of, over))

    def milliseconds(self, name: str, seconds: Sequence[float]) -> None:
        """Write down the median of some times."""
        values = sorted(1000 * value for value in seconds)
        self.number(name, values[len(values) // 2], quartiles(values))

    def check(self, name: str, error: float, bound: float, **facts: Any) -> None:
        """Write down how far something is from what it should be, and whether that is within `bound`."""
        self.write(name=name, value=float(error), spread=[error, error], bound=bound, right=error <= bound, **facts)

    @contextmanager
    def attempt(self, part: str) -> Iterator[None]:
        """Go on behind the block whatever happens inside; a failure is named, and its memory given back."""
        try:
            yield
        except Exception as error:
            self.failed(error, part)
            _forget(error)
        self.free()
        self.alive()

    def failed(self, error: BaseException, part: str = "") -> None:
        """Write a failure down."""
        text = traceback.format_exception(error)
        last = [line for piece in text for line in piece.rstrip().splitlines()][-_TRACEBACK_LINES:]
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.write(part=part, failed=what, traceback=[line[:200] for line in last])

    def free(self) -> None:
        """Give back what nothing holds any more."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def alive(self) -> None:
        """End the process where the device does not answer; whoever started it starts another one."""
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.ones(8, device="cuda").sum().item()
        except Exception as error:  # noqa: BLE001
            self.failed(error, "the device answers no more")
            sys.exit(BROKEN)

    def bench(self, name: str) -> Bench:
        """Return the random model of a workload, which is kept until another one is asked for."""
        from benchmarks.support.shapes import LEASE, Bench

        if self._bench is None or self._bench[0] != name:
            self.forget()
            started = time.perf_counter()
            self._bench = (name, Bench(LEASE[self.device][name], self.device))
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.number(f"made_seconds_{name}", time.perf_counter() - started)
        return self._bench[1]

    def forget(self) -> None:
        """Drop the model."""
        self._bench = None
        self.free()

    def ceilings(self) -> Mapping[str, float]:
        """Return what the device reaches: bytes a second of a copy (read plus written), FLOP/s of a matrix product."""
        if not self._ceilings:
            self._ceilings = measure_ceilings(self.device)
        return self._ceilings


def measure_ceilings(device: str) -> dict[str, float]:
    """Time a large copy and a large matrix product, on random data."""
    small = device != "cuda"
    dtype = torch.float32 if small else torch.bfloat16
    source = torch.randn((1 << 20) if small else (1 << 30), device=device, dtype=dtype)
    target, side = torch.empty_like(source), 256 if small else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return {
        "copy_bytes_a_second": 2 * source.nbytes / _best(lambda: target.copy_(source), device),
        "matmul_flops_a_second": 2 * side**3 / _best(lambda: a @ b, device),
    }


def _best(work: Callable[[], Any], device: str) -> float:
    """Return the median seconds of ten runs, without a wait between them."""
    return alternate({"work": work}, 5, warmup=2, device=device, inner=10).median("work")


def _forget(error: BaseException) -> None:
    """Let go of what the frames of an error hold: a step's activations."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def _shown(entry: Mapping[str, Any]) -> str:
    where = f"{entry.get('item', '')} {entry.get('name', entry.get('part', ''))}".strip()
    if "failed" in entry:
        return f"FAILED {where}: {entry['failed']}\n    " + "\n    ".join(entry["traceback"])
    if "skipped" in entry:
        return f"skipped {where}: {entry['skipped']}"
    if "value" in entry:
        wrong = "" if entry.get("right", True) else f"  WRONG, bound {entry['bound']:.3g}, {entry.get('worst', '')}"
        return f"{where} = {entry['value']:.5g}{wrong}"
    return f"{where} took {entry['took']:.1f} s" if "took" in entry else ""


def work(lease: Lease, items: Sequence[Item]) -> None:
    """Go through the items."""
    for item in items:
        lease.item = item.name
        needed = item.seconds if not lease.rehearses else 0.0
        if lease.left < needed:
            lease.write(skipped=f"no time (needs {needed:.0f} s, {max(0.0, lease.left):.0f} s left)")
            continue
        started = time.time()
        lease.write(started=started)
        with lease.attempt(""):
            module, _, function = item.call.partition(":")
            getattr(importlib.import_module(f"benchmarks.support.{module}"), function)(lease, **item.arguments)
        lease.write(took=time.time() - started)
    lease.item = ""


def main() -> None:
    """Do what `benchmarks.cuda` asks of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("items", nargs="+")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    lease = Lease(given.device, given.lines, given.until)
    lease.write(machine=machine(given.device), versions=versions(), commit=commit())
    for module in ("exact", "items"):  # before an item's time begins; one that fails is named by its items
        with suppress(Exception):
            importlib.import_module(f"benchmarks.support.{module}")
    work(lease, [item for item in ITEMS if item.name in given.items])


if __name__ == "__main__":
    main()
