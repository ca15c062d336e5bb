"""What trials cost beside their time (FLOPs of their samples' steps, the peak of memory), and how many go together."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import psutil
import torch
from torch import nn

from pipeline.adapters.base import Adapter
from pipeline.backbones.weights import weight_bytes
from pipeline.config.trial import MOST_PACKED
from pipeline.core.errors import InputError
from pipeline.cost.flops import Costs, Prompt
from pipeline.data.manifest import Manifest
from pipeline.prompts.prompt import Encoded
from pipeline.resident.resident import Resident

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # what Linux takes as: the high-water mark is what is held now


def flops_per_sample(
    adapter: Adapter, resident: Resident, prompts: Sequence[Encoded], prefix_length: int,
    manifest: Manifest, shots: int,
) -> tuple[float, float] | None:  # fmt: skip
    """Return the FLOPs of one sample's step, and those before the first step (`pipeline.cost`).

    With visual tokens at hand and a teacher of its own.

    What shared prefixes, packs and a shared teacher save is not taken off: it is what the method asks for.

    Args:
        adapter: what is trained.
        resident: the backbone.
        prompts: the training samples' own; their mean lengths count.
        prefix_length: tokens that all of them begin with, which stand once before a teacher's demonstrations.
        manifest: of the task; its first picture's size counts, where it has any.
        shots: demonstrations of a teacher, or those that the method starts from.

    Returns:
        None where it cannot be told: another architecture, a picture that is gone and lives on as visual tokens, a
        model of pictures that is given none.
    """
    model, backbone = resident.loaded.model, resident.loaded.backbone
    if not prompts[0].images and backbone.modules.vision:
        return None
    try:
        size = None
        if prompts[0].images:
            pixels = resident.visual.pixels([prompts[0].images[:1]], manifest.image_root)["pixel_values"]
            size = pixels.shape[-2], pixels.shape[-1]
        costs = Costs(backbone, model, image_size=size)
    except InputError:
        return None
    spans = [prompt.answer_span for prompt in prompts]
    costs.prompt = Prompt(
        text=max(0, round(fmean(map(len, prompts))) - costs.image.tokens),
        answer=round(fmean(span[1] - span[0] for span in spans if span is not None)),
        head=prefix_length,
    )
    return costs.of(adapter, shots=shots).reused, costs.start(adapter, shots=shots)


class Memory:
    """The peak of a trial's memory: the backbone's weights, and the most that was held beyond what was there before it.

    So neither what earlier trials left for later ones counts (a teacher's targets, visual tokens) nor the interpreter.
    Trials of one pack are counted together.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        self.device = device
        self.weights = weight_bytes(model)
        if device == "cpu":
            _give_back()
            with suppress(OSError):
                _CLEAR.write_text(_FORGET_PEAK)
        else:
            torch.cuda.reset_peak_memory_stats(device)
        self.before = self._peak() or 0
        self.highest = 0

    def note(self) -> None:
        """Remember the peak so far, before `Capacity` has the card count anew."""
        self.highest = max(self.highest, self._peak() or 0)

    @property
    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        peak = self._peak()
        return None if peak is None else self.weights + max(0, max(self.highest, peak) - self.before)

    def _peak(self) -> int | None:
        if self.device != "cpu":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError, StopIteration, ValueError):
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        return None


def _give_back() -> None:
    """Let malloc return its free pages: a process of many trials else keeps the largest one's for good (glibc only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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

    def begin(self) -> None:
        """Count the peak from here: what selection took before is no part of what training takes."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)

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

    @property
    def why(self) -> str:
        """Why `best` is what it is, in a line."""
        best, most = self.best(), MOST_PACKED["cuda" if self.device != "cpu" else "cpu"]
        known = ", ".join(f"{trials}: {rate:.0f}" for trials, rate in sorted(self.rates.items())) or "none yet"
        if best not in self.rates:
            why = f"{best} are tried"
        elif best == most:
            why = f"{best} are the most"
        elif 2 * best in self.rates:
            gain = self.rates[2 * best] / self.rates[best]
            why = f"{best}, for {2 * best} bring {gain:.2f} times as many, and {PAYS:g} are asked"
        else:
            why = f"{best}, for {2 * best} would not fit the memory"
        return f"{why}; samples a second by trials in one pass: {known}"

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
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _total(self) -> int:
        if self.device != "cpu":
            return torch.cuda.get_device_properties(self.device).total_memory
        return psutil.virtual_memory().available + self._peak()
