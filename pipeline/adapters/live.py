"""LIVE: a learned vector added to every layer's hidden state, the norm kept."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from pipeline.adapters.base import METHODS, HiddenAdapter, Init
from pipeline.adapters.options import Facts, Options
from pipeline.backbones.decoder import DecoderSpec

_DIRECTION_STD, _MAGNITUDE = 0.01, 0.1


class LIVEOptions(Options):
    """LIVE's options."""

    magnitude_learning_rate: float | None = Field(default=None, gt=0)  # None: twice the trial's (1e-2 beside 5e-3)

    def facts(self) -> Facts:
        """KL between the teacher's and the student's answer distributions plus half the cross-entropy."""
        return Facts(teacher="logits", alignment_weight=1.0, ground_truth_weight=0.5)


@METHODS.register("live")
class LIVE(HiddenAdapter):
    """After each layer's FFN, h <- (h + a u) |h| / |h + a u| (LIVE).

    u in R^D ~ N(0, 0.01^2), a a scalar of 0.1 at the start. Trainable: L (D + 1).
    """

    name = "live"
    Options: ClassVar[type[Options]] = LIVEOptions
    undecayed = ("magnitude",)
    options: LIVEOptions

    def __init__(self, options: LIVEOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__(options, spec, init)
        self.direction = init.normal(spec.num_layers, spec.hidden_size, std=_DIRECTION_STD)
        self.magnitude = init.full(spec.num_layers, 1, value=_MAGNITUDE)

    def learning_rate_of(self, parameter: str, learning_rate: float) -> float:
        """The magnitude learns faster than the direction."""
        if parameter != "magnitude":
            return learning_rate
        return self.options.magnitude_learning_rate or 2 * learning_rate

    def forward(self) -> dict[str, Tensor]:
        """Return all layers' shifts, [L, D]."""
        return {"shift": self.magnitude * self.direction}
