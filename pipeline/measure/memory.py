"""Peak of the memory that torch allocates inside a block, on a GPU or on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Peak:
    """Bytes above what was held at the start; filled at the end of the block."""

    value: int = 0


@contextmanager
def peak_bytes(cuda: bool) -> Iterator[Peak]:
    """Measure the highest sum of torch's allocations inside the block, what was held before left out."""
    found = Peak()
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.value = torch.cuda.max_memory_allocated() - before
        return
    # the CPU's allocator keeps no statistics; the profiler sees each of its calls
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield found
    calls = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = 0
    for event in sorted(calls, key=lambda one: one.start_ns()):
        held += event.nbytes()
        found.value = max(found.value, held)
