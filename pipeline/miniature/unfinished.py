"""What an interrupted pre-training goes on from: one file beside the checkpoint, gone once that is there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.core.files import remove_file, write_atomic
from pipeline.core.plain_yaml import Json

FILE = "unfinished.safetensors"
Curve = list[dict[str, object]]


@dataclass
class Phase:
    """One phase of a pre-training: all that its next step depends on.

    Attributes:
        name: of the phase.
        modules: what is trained, the model first.
        optimiser: theirs.
        rng: of what is drawn.
        noise: of what else is drawn.
        step: how many steps are behind it.
        seconds: that it has taken until it was gone on with, at `began`.
    """

    name: str
    modules: Sequence[nn.Module]
    optimiser: torch.optim.Optimizer
    rng: np.random.Generator
    noise: torch.Generator | None = None
    step: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Kept:
    """What the file holds beside tensors.

    Attributes:
        of: what has to be the same for it to be gone on with.
        phase, step: where it stands.
        curves, seconds: by phase, as far as they are.
        rng: state of the phase's numbers.
    """

    of: Mapping[str, Any]
    phase: str
    step: int
    curves: dict[str, Curve]
    seconds: dict[str, float]
    rng: Json


@dataclass
class Unfinished:
    """Keeps a phase at each record of its curve, so that what was trained since then is all that can be lost.

    Attributes:
        file: where.
        of: what has to be the same for it to be gone on with: backbone, world, seed, budget, code, threads.
        curves: of the phases, by name, as far as they are.
        seconds: that each has taken.
    """

    file: Path
    of: Mapping[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def keep(self, phase: Phase, record: dict[str, object]) -> None:
        """Add a record, of the step that the phase has come to, and write the phase's state; the file is replaced."""
        self.curves.setdefault(phase.name, []).append(record)
        self.seconds[phase.name] = phase.seconds + time.monotonic() - phase.began
        states = phase.optimiser.state_dict()["state"]
        tensors = {f"parameter.{name}": p.detach() for name, p in _parameters(phase.modules).items()}
        tensors |= {f"optimiser.{i}.{name}": x for i, state in states.items() for name, x in state.items()}
        if phase.noise is not None:
            tensors["noise"] = phase.noise.get_state()
        tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
        kept = Kept(self.of, phase.name, phase.step, self.curves, self.seconds, dict(phase.rng.bit_generator.state))
        write_atomic(self.file, save(tensors, {"kept": json.dumps(asdict(kept))}))

    def start(self, model: nn.Module) -> str:
        """Bring a model to where it was kept, if it was; return where that is, in words."""
        kept = self._kept()
        if kept is None:
            return ""
        self.curves, self.seconds = kept.curves, kept.seconds
        _fill([model], self._tensors())
        return f"; going on after step {kept.step:,} of {kept.phase}"

    def restore(self, phase: Phase) -> None:
        """Bring a phase to where it was kept, if it was."""
        kept = self._kept()
        if kept is None or kept.phase != phase.name:
            return
        tensors = self._tensors()
        _fill(phase.modules, tensors)
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                number, _, part = rest.partition(".")
                states.setdefault(int(number), {})[part] = tensor
        phase.optimiser.load_state_dict({**phase.optimiser.state_dict(), "state": states})
        if phase.noise is not None:
            phase.noise.set_state(tensors["noise"])
        phase.rng.bit_generator.state = kept.rng
        phase.step, phase.seconds = kept.step, kept.seconds[phase.name]

    def remove(self) -> None:
        """Remove the file: the checkpoint is there."""
        remove_file(self.file)

    def _kept(self) -> Kept | None:
        """Return what is kept of the same; None where nothing is, or a file that is of no use and is written anew."""
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as file:
                kept = Kept(**json.loads(file.metadata()["kept"]))
        except (SafetensorError, ValueError, TypeError, KeyError):
            return None
        return kept if kept.of == self.of else None

    def _tensors(self) -> dict[str, Tensor]:
        with safe_open(self.file, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def _parameters(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return all parameters of modules by name, tied ones once."""
    return {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}


@torch.no_grad()
def _fill(modules: Sequence[nn.Module], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in _parameters(modules).items():
        parameter.copy_(tensors[f"parameter.{name}"])
