"""MimIC: a shift of every head's attention output, of a size that depends on the query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_validator, model_serializer
from torch import Tensor

from pipeline.adapters.base import METHODS, AttentionAdapter, Init
from pipeline.adapters.options import Facts, Options, Taught
from pipeline.backbones.decoder import DecoderSpec
from pipeline.core.plain_yaml import Json

_SHIFT_STD, _GATE_STD = 0.001, 0.02
_OUTPUT: dict[str, Literal["mlp", "attention"]] = {"ffn": "mlp", "attention": "attention"}


class MimICOptions(Options):
    """MimIC's options: the form of the shift (Table 8), and where hidden states are aligned."""

    shift: Literal["vector", "blend", "linear"] = "vector"
    alignment: Literal["ffn", "attention"] = "ffn"
    # the output of the FFN or the attention, by `alignment`, or the residual stream once that output was added
    point: Literal["mlp", "attention", "residual"] = Field(default_factory=lambda given: _OUTPUT[given["alignment"]])
    teacher: Taught = True  # its own; false: cross-entropy alone, logits: LIVE's KL

    @field_validator("point")
    @classmethod
    def _of_its_alignment(cls, point: str, info: ValidationInfo) -> str:
        output = _OUTPUT.get(info.data.get("alignment", ""), point)
        if point not in (output, "residual"):
            raise ValueError(f"with alignment '{info.data['alignment']}' it is '{output}' or 'residual'")
        return point

    @classmethod
    def completed(cls, recorded: Mapping[str, Any]) -> Json:
        """Before there was a point, the residual stream was compared after the FFN, and the attention's output."""
        point = "attention" if recorded.get("alignment") == "attention" else "residual"
        return super().completed({"point": point, **recorded})

    def facts(self) -> Facts:
        """Alignment with the teacher's hidden states plus half the cross-entropy, unless `teacher` is another."""
        middle = self.point == "residual" and self.alignment == "attention"
        return Facts(state="residual-mid" if middle else self.point).taught_by(self.teacher)

    @model_serializer(mode="wrap")
    def _plain(self, serialise: SerializerFunctionWrapHandler) -> Json:
        """Leave out the teacher that is MimIC's own, and with another one what is aligned."""
        unheard = ("teacher",) if self.teacher is True else ("alignment", "point")
        return {name: value for name, value in serialise(self).items() if name not in unheard}


@METHODS.register
class MimIC(AttentionAdapter):
    """A learned shift of each head's output, weighted by mu = Z1 / (Z1 + Z2), log Z1 = w.q + b (MimIC Sec. 3.1).

    `vector`: SA + mu v. `blend`: (1 - mu) SA + mu h. `linear`: (1 - mu) SA + mu (M q + c).
    A single virtual token whose logit is w.q + b: its key is w / scale and its bias b.
    v ~ N(0, 0.001^2), w ~ N(0, 0.02^2), b = 0. Trainable: H L (2 d + 1); `linear` H L (d^2 + 2 d + 1).
    """

    name = "mimic"
    Options: ClassVar[type[Options]] = MimICOptions
    options: MimICOptions

    def __init__(self, options: MimICOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__(options, spec, init)
        grid, size = (spec.num_attentions, spec.num_heads), spec.head_dim
        self.replaces = options.shift != "vector"
        self.scale = float(getattr(spec.attentions[0], "scaling", size**-0.5))
        self.shift = init.normal(*grid, size, std=_SHIFT_STD)
        self.gate = init.normal(*grid, size, std=_GATE_STD)
        self.gate_bias = init.full(*grid)
        if options.shift == "linear":
            self.linear = init.normal(*grid, size, size, std=_SHIFT_STD)

    @property
    def undecayed(self) -> tuple[str, ...]:  # type: ignore[override]
        """The bias of the gate; with a linear shift, its bias too."""
        return ("gate_bias", "shift") if self.options.shift == "linear" else ("gate_bias",)

    def forward(self) -> dict[str, Tensor]:
        """Return all layers' single virtual token."""
        tokens = {
            "keys": (self.gate / self.scale).unsqueeze(2),
            "bias": self.gate_bias.unsqueeze(2),
            "values": self.shift.unsqueeze(2),
        }
        if self.options.shift == "linear":
            tokens["linear"] = self.linear
        return tokens
