"""LIVE: a learned vector added to the output of every layer's FFN, the norm kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipeline.adapters.base import METHODS, HiddenAdapter, Init
from pipeline.adapters.options import Facts, Options
from pipeline.backbones.decoder import DecoderSpec

_DIRECTION_STD, _MAGNITUDE = 0.01, 0.1


class LIVEOptions(Options):
    """LIVE's options."""

    later: ClassVar[Mapping[str, Any]] = {"point": "residual"}
    point: Literal["mlp", "residual"] = "mlp"  # what is shifted: the FFN's output, or the residual stream behind it
    magnitude_learning_rate: float | None = Field(default=None, gt=0)  # None: twice the trial's (1e-2 beside 5e-3)

    def facts(self) -> Facts:
        """KL between the teacher's and the student's answer distributions plus half the cross-entropy."""
        return Facts(teacher="logits", alignment_weight=1.0, ground_truth_weight=0.5)


@METHODS.register
class LIVE(HiddenAdapter):
    """After each layer's FFN, m <- (m + a u) |m| / |m + a u| (LIVE).

    m is the FFN's output, before it is added to the residual stream; with `point: residual` the stream itself.
    u in R^D ~ N(0, 0.01^2), a a scalar of 0.1 at the start. Trainable: L (D + 1).
    """

    name = "live"
    Options: ClassVar[type[Options]] = LIVEOptions
    undecayed = ("magnitude",)
    options: LIVEOptions

    def __init__(self, options: LIVEOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__(options, spec, init)
        self.state = options.point
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
