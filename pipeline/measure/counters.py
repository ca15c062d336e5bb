"""What torch does inside a block, counted: FLOPs of its matrix products, and the peak of what it allocates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


class CountedFlops(TorchDispatchMode):
    """Counts while it is entered, forward and backward; `total` holds the sum.

    torch's own FlopCounterMode also follows modules by hooks, which a backward pass that ends at an adapter breaks, and
    its table lacks the CPU's fused attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._own: dict[Any, Any] = {_CPU_ATTENTION: _forward, _CPU_ATTENTION_BACKWARD: _backward}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in self._own:
            self.total += self._own[packet](*args, **kwargs)
        elif packet in flop_registry:
            count: Any = flop_registry[packet]
            self.total += count(*args, **kwargs, out_val=out)
        return out


@dataclass
class Peak:
    """Bytes above what was held at the start; filled at the end of the block."""

    value: int = 0


@contextmanager
def peak_bytes(cuda: bool) -> Iterator[Peak]:
    """Measure the highest sum of torch's allocations inside the block, what was held before left out."""
    peak = Peak()
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        torch.cuda.synchronize()
        peak.value = torch.cuda.max_memory_allocated() - before
        return
    # the CPU's allocator keeps no statistics; the profiler sees each of its calls
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield peak
    calls = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = 0
    for event in sorted(calls, key=lambda call: call.start_ns()):
        held += event.nbytes()
        peak.value = max(peak.value, held)
