"""How many trials one process trains together: what was measured to pay, and what fits the memory."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field

import psutil
import torch

from pipeline.config.trial import MOST_PACKED

PAYS = 1.05  # a larger pack must train this much faster, in samples per second, than the one of half its size
FILL = 0.9  # of the device's memory
STEPS = 4  # fewer say too little


@dataclass
class Capacity:
    """Grows a pack by doubling, as long as that pays and fits.

    Args:
        device: `cpu` or a CUDA device's name.
    """

    device: str
    rates: dict[int, float] = field(default_factory=dict)  # samples per second by number of trials
    peaks: dict[int, int] = field(default_factory=dict)  # bytes by number of trials

    def note(self, trials: int, samples: int, seconds: float, steps: int) -> None:
        """Take in what a pack of `trials` did."""
        if steps < STEPS:
            return
        rate = samples / seconds
        self.rates[trials] = max(rate, self.rates.get(trials, 0.0))  # the slower of two was disturbed
        self.peaks[trials] = max(self._peak(), self.peaks.get(trials, 0))

    def best(self) -> int:
        """Return how many trials to train together: the next size to try, or the one that it has settled on."""
        size, most = 1, MOST_PACKED["cuda" if self.device != "cpu" else "cpu"]
        while size < most and size in self.rates:
            if 2 * size in self.rates and self.rates[2 * size] < PAYS * self.rates[size]:
                return size
            if not self._fits(2 * size):
                return size
            size *= 2
        return size

    def room(self, trials: int) -> int:
        """Return how many may join `trials` that are there."""
        return max(0, self.best() - trials)

    def _fits(self, trials: int) -> bool:
        known = sorted(n for n in self.peaks if n < trials)
        if len(known) < 2:
            return True  # the next size tells what a trial takes
        small, large = known[0], known[-1]
        each = max(0, self.peaks[large] - self.peaks[small]) / (large - small)
        return self.peaks[large] + each * (trials - large) <= FILL * self._total()

    def _peak(self) -> int:
        if self.device != "cpu":
            return torch.cuda.max_memory_reserved(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _total(self) -> int:
        if self.device != "cpu":
            return torch.cuda.get_device_properties(self.device).total_memory
        return psutil.virtual_memory().available + self._peak()
