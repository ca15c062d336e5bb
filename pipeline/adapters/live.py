"""What is done to a state of every layer: LIVE's, M2IV's and I2CL's vectors, bottleneck adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from pipeline.adapters.base import METHODS, HiddenAdapter, Init, Shown
from pipeline.adapters.combined import Combined
from pipeline.adapters.options import Facts, Options, Taught, TeacherOptions
from pipeline.backbones.decoder import DecoderSpec
from pipeline.core.plain_yaml import Json

_DIRECTION_STD, _MAGNITUDE = 0.01, 0.1
_Place = Literal["attention", "mlp"]


class LIVEOptions(Options):
    """LIVE's options."""

    later: ClassVar[Mapping[str, Any]] = {"point": "residual"}
    point: Literal["mlp", "residual"] = "mlp"  # what is shifted: the FFN's output, or the residual stream behind it
    teacher: Taught = "logits"  # its own; false: cross-entropy alone, true: MimIC's alignment, at `point`
    magnitude_learning_rate: float | None = Field(default=None, gt=0)  # None: twice the trial's (1e-2 beside 5e-3)

    def facts(self) -> Facts:
        """KL from the teacher's answer distributions plus half the cross-entropy, unless `teacher` is another."""
        return Facts(state=self.point if self.teacher is True else "mlp").taught_by(self.teacher)

    @model_serializer(mode="wrap")
    def _plain(self, serialise: SerializerFunctionWrapHandler) -> Json:
        """Leave out the teacher that is LIVE's own."""
        return {name: value for name, value in serialise(self).items() if name != "teacher" or value != "logits"}


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


class BottleneckOptions(TeacherOptions):
    """How wide the bottleneck is, and behind which of a layer's modules there is one."""

    width: int = Field(default=16, ge=1)
    places: tuple[_Place, ...] = Field(default=("attention", "mlp"), min_length=1)  # mlp alone: Pfeiffer et al. 2021

    def facts(self) -> Facts:
        """Cross-entropy alone, or with a teacher."""
        return self.taught(Facts(learning_rate=1e-3))


class M2IVOptions(TeacherOptions):
    """M2IV's options: by whom it is taught."""

    teacher: Taught = "logits"

    def facts(self) -> Facts:
        """KL from the teacher's answers plus half the cross-entropy, unless `teacher` is another."""
        return self.taught(Facts())


class I2CLOptions(TeacherOptions):
    """I2CL's options: whether there is a teacher besides."""

    def facts(self) -> Facts:
        """Cross-entropy alone, or with a teacher; the vectors come from demonstrations."""
        return self.taught(Facts(learning_rate=1e-2, starts=True))


class _Bottleneck(HiddenAdapter):
    undecayed = ("down_bias", "up_bias")

    def __init__(self, options: BottleneckOptions, spec: DecoderSpec, init: Init, state: _Place) -> None:
        super().__init__(options, spec, init)
        self.state = state
        layers, wide, narrow = _layers(spec, state), spec.hidden_size, options.width
        self.down, self.down_bias = init.normal(layers, wide, narrow, std=_DIRECTION_STD), init.full(layers, narrow)
        self.up, self.up_bias = init.normal(layers, narrow, wide, std=_DIRECTION_STD), init.full(layers, wide)

    def forward(self) -> dict[str, Tensor]:
        """Return all layers' matrices and biases."""
        return dict(self.named_parameters())

    @staticmethod
    def edited(x: Tensor, **given: Tensor) -> Tensor:
        """Return x + W_up gelu(W_down x + b_down) + b_up."""
        narrow = torch.nn.functional.gelu(x @ given["down"] + given["down_bias"])
        return x + narrow @ given["up"] + given["up_bias"]


class _Vector(HiddenAdapter):
    undecayed = ("scale",)

    def __init__(self, options: M2IVOptions, spec: DecoderSpec, init: Init, state: _Place) -> None:
        super().__init__(options, spec, init)
        self.state = state
        layers = _layers(spec, state)
        self.vector = init.normal(layers, spec.hidden_size, std=_DIRECTION_STD)
        self.scale = init.full(layers, 1, value=_MAGNITUDE)

    def forward(self) -> dict[str, Tensor]:
        """Return all layers' shifts."""
        return {"shift": self.scale * self.vector}

    @staticmethod
    def edited(x: Tensor, **given: Tensor) -> Tensor:
        """Return x + shift, its norm as it comes."""
        return x + given["shift"]


class _Context(HiddenAdapter):
    undecayed = ("strength", "share")
    context: Tensor

    def __init__(self, options: I2CLOptions, spec: DecoderSpec, init: Init, state: _Place) -> None:
        super().__init__(options, spec, init)
        self.state, layers = state, _layers(spec, state)
        self.register_buffer("context", init.normal(layers, spec.hidden_size, std=_DIRECTION_STD).data)
        self.strength, self.share = init.full(layers, 1, value=_MAGNITUDE), init.full(layers, 1, value=1.0)

    @torch.no_grad()
    def start(self, shown: Shown) -> None:
        """Take the demonstrations' mean."""
        self.context.copy_(shown.states(self.state).mean(1))

    def forward(self) -> dict[str, Tensor]:
        """Return all layers' factors, [L, 1], and shifts, [L, D]."""
        return {"scale": self.share, "shift": self.strength * self.context}

    @staticmethod
    def edited(x: Tensor, **given: Tensor) -> Tensor:
        """Return scale x + shift."""
        return given["scale"] * x + given["shift"]


class _Behind(Combined):
    """One part behind each module of a layer."""

    part_of: ClassVar[Any]

    @classmethod
    def build(cls, model: nn.Module, spec: DecoderSpec, options: Any, seed: int, device: torch.device) -> _Behind:
        """Make a part for every place."""
        init = Init(seed, device)
        places = getattr(options, "places", ("attention", "mlp"))
        return cls(options, spec, init, {place: cls.part_of(options, spec, init, place) for place in places})


@METHODS.register
class Bottleneck(_Behind):
    """x <- x + W_up gelu(W_down x + b_down) + b_up, on what attention gives and on what the FFN gives.

    Before each is added to the residual stream: the adapter of Houlsby et al. 2019 (arXiv 1902.00751); with
    `places: [mlp]` behind the FFN alone. W ~ N(0, 0.01^2), so that it starts near the identity, b = 0.
    Trainable: L (2 D r + r + D) a place.
    """

    name = "bottleneck"
    Options: ClassVar[type[Options]] = BottleneckOptions
    part_of = _Bottleneck


@METHODS.register
class M2IV(_Behind):
    """a <- a + alpha_a v_a and m <- m + alpha_m v_m in every layer (M2IV, 2025), no norm kept.

    a is what attention gives, m what the FFN gives. v ~ N(0, 0.01^2) in R^D, alpha a scalar of 0.1 at the start; taught
    by the answers of the model behind demonstrations. The paper's synergistic loss between the two vectors is no part
    of it. Trainable: 2 L (D + 1).
    """

    name = "m2iv"
    Options: ClassVar[type[Options]] = M2IVOptions
    part_of = _Vector


@METHODS.register
class I2CL(_Behind):
    """a <- beta_a a + lambda_a c_a and m <- beta_m m + lambda_m c_m in every layer (I2CL, Li et al. 2024).

    a is what attention gives, m what the FFN gives; c_a and c_m are what the frozen model gives there at the last token
    of a demonstration alone, the mean over `num_shots` demonstrations of the training split, drawn once by the trial's
    seed. They stay; the scalars learn, from beta = 1 and lambda = 0.1, by cross-entropy on the training samples (the
    paper's few demonstrations are their own training set). The paper's noise in training is no part of it. Until it has
    seen demonstrations c ~ N(0, 0.01^2). arXiv 2405.14660. Trainable: 4 L.
    """

    name = "i2cl"
    Options: ClassVar[type[Options]] = I2CLOptions
    part_of = _Context


def _layers(spec: DecoderSpec, state: _Place) -> int:
    return spec.num_attentions if state == "attention" else spec.num_layers
