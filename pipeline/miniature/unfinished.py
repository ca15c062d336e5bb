"""What an interrupted pre-training goes on from: one file beside the checkpoint, gone once that is there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.core.files import remove_file, write_atomic

FILE = "unfinished.safetensors"


@dataclass
class Phase:
    """One phase of a pre-training: all that its next step depends on, and its curve.

    Attributes:
        name: of the phase.
        modules: what is trained, the model first.
        optimiser: theirs.
        rng: of what is drawn.
        noise: of what else is drawn.
        curve: its records until now.
        step: how many steps are behind it.
        seconds: that it has taken until it was gone on with, at `began`.
    """

    name: str
    modules: Sequence[nn.Module]
    optimiser: torch.optim.Optimizer
    rng: np.random.Generator
    noise: torch.Generator | None = None
    curve: list[dict[str, object]] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters by name, tied ones once."""
        return self.parameters_of(self.modules)

    @staticmethod
    def parameters_of(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
        """Return all parameters of modules by name, tied ones once."""
        return {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}


@dataclass
class Unfinished:
    """Keeps a phase at each record of its curve, so that what was trained since then is all that can be lost.

    Attributes:
        file: where; None: nothing is kept.
        of: what has to be the same for it to be gone on with: backbone, world, seed, budget, code, threads.
        curves: of the phases, by name, as far as they are.
        seconds: that each has taken.
    """

    file: Path | None
    of: Mapping[str, Any]
    curves: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def keep(self, phase: Phase) -> None:
        """Write the phase's state; the file is replaced whole."""
        self.curves[phase.name] = phase.curve
        self.seconds[phase.name] = phase.seconds + time.monotonic() - phase.began
        if self.file is None:
            return
        state = phase.optimiser.state_dict()["state"]
        tensors = {f"parameter.{name}": p.detach().cpu() for name, p in phase.parameters.items()}
        tensors |= {f"optimiser.{i}.{name}": x.cpu() for i, of_one in state.items() for name, x in of_one.items()}
        if phase.noise is not None:
            tensors["noise"] = phase.noise.get_state()
        about = {
            "of": self.of, "phase": phase.name, "step": phase.step, "curves": self.curves, "seconds": self.seconds,
            "rng": phase.rng.bit_generator.state,
        }  # fmt: skip
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        write_atomic(self.file, save(tensors, {"about": json.dumps(about)}))

    def about(self) -> dict[str, Any]:
        """Return what is kept, but for its tensors; nothing where none is, or one of something else."""
        if self.file is None or not self.file.is_file():
            return {}
        try:
            with safe_open(self.file, "pt") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
        except (SafetensorError, ValueError):  # of no use; it is written anew
            return {}
        return about if about.get("of") == json.loads(json.dumps(self.of)) else {}

    def start(self, model: nn.Module) -> str:
        """Bring a model to where it was kept, if it was; return where that is, in words."""
        about = self.about()
        if not about:
            return ""
        self.curves, self.seconds = about["curves"], about["seconds"]
        self._fill(Phase.parameters_of([model]), self._tensors())
        return f"; going on after step {about['step']:,} of {about['phase']}"

    def restore(self, phase: Phase) -> None:
        """Bring a phase to where it was kept, if it was."""
        about = self.about()
        if about.get("phase") != phase.name:
            return
        tensors = self._tensors()
        self._fill(phase.parameters, tensors)
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                number, _, of_state = rest.partition(".")
                states.setdefault(int(number), {})[of_state] = tensor
        phase.optimiser.load_state_dict({**phase.optimiser.state_dict(), "state": states})
        if phase.noise is not None:
            phase.noise.set_state(tensors["noise"])
        phase.rng.bit_generator.state = about["rng"]
        phase.curve, phase.step, phase.seconds = self.curves[phase.name], int(about["step"]), self.seconds[phase.name]

    def _tensors(self) -> dict[str, Tensor]:
        with safe_open(str(self.file), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping

    @staticmethod
    @torch.no_grad()
    def _fill(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])

    def remove(self) -> None:
        """Remove the file: the checkpoint is there."""
        if self.file is not None:
            remove_file(self.file)
