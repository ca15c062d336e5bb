"""`Adapter`: what every trained method is, and the registry that its file enters.

A method edits the decoder in one or more of three places, and says so by the class it derives from:
`AttentionAdapter` (virtual tokens beside the context), `HiddenAdapter` (what every layer's FFN gives) or
`WeightsAdapter` (low-rank updates of projections). Parameters are fp32, stacked over layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.adapters.options import Facts
from pipeline.adapters.options import Options as AnyOptions
from pipeline.backbones.decoder import DecoderSpec
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import Json
from pipeline.core.registry import Registry

METHODS: Registry[type[Adapter]] = Registry("method", "pipeline.adapters", "hificl.methods")
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
RECORD_FILE = "hificl.json"  # what CONFIG_FILE holds elsewhere, where that is PEFT's own


@dataclass(frozen=True)
class BackboneIdentity:
    """What of a backbone an adapter is made for; it fits no other."""

    model_type: str
    num_layers: int
    num_heads: int
    head_dim: int
    hidden_size: int

    @classmethod
    def of(cls, spec: DecoderSpec) -> BackboneIdentity:
        """Read the identity off a decoder."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(cls)})

    def check(self, spec: DecoderSpec, where: str) -> None:
        """Refuse a decoder that is not this one, by the first value that differs.

        Raises:
            InputError: the model has another type or another shape.
        """
        present = asdict(BackboneIdentity.of(spec))
        for name, wanted in asdict(self).items():
            if present[name] != wanted:
                raise InputError(
                    f"the adapter was made for a backbone with {name} {wanted}, this model has {present[name]}",
                    where=where,
                    way_out="Use the backbone that the adapter was trained on",
                )


@dataclass(frozen=True)
class AdapterConfig:
    """What a saved adapter is, and `extra`, what its trial noted beside it; PEFT's own names no backbone."""

    method: str
    options: Json
    backbone: BackboneIdentity | None
    extra: Json


class ParameterGroup(TypedDict):
    """Parameters with a learning rate and a weight decay of their own, as AdamW takes them."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float


class Init:
    """Deterministic initial values: one CPU generator, so that device and global random state do not matter."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def normal(self, *shape: int, std: float) -> nn.Parameter:
        """Return a parameter drawn from N(0, std^2)."""
        return self.place(lambda: torch.randn(shape, generator=self.generator) * std, shape)

    def full(self, *shape: int, value: float = 0.0) -> nn.Parameter:
        """Return a constant parameter."""
        return self.place(lambda: torch.full(shape, value), shape)

    def place(self, make: Any, shape: Sequence[int]) -> nn.Parameter:
        """Return `make()` on the device; on the meta device nothing is drawn."""
        if self.device.type == "meta":
            return nn.Parameter(torch.empty(tuple(shape), device="meta"))
        return nn.Parameter(make().to(self.device))


class Adapter(nn.Module):
    """A trained method: parameters, options, and the backbone that it fits.

    Args:
        options: the method's own, validated.
        spec: the decoder that it is made for.
        init: source of initial values.
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type[AnyOptions]] = AnyOptions
    undecayed: ClassVar[tuple[str, ...]] = ()  # parameters without weight decay: biases, scalars

    def __init__(self, options: AnyOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__()
        self.options, self.backbone = options, BackboneIdentity.of(spec)

    @classmethod
    def build(cls, model: nn.Module, spec: DecoderSpec, options: Any, seed: int, device: torch.device) -> Adapter:
        """Make the adapter for `model`; methods that look beyond the decoder override this."""
        return cls(options, spec, Init(seed, device))

    @property
    def facts(self) -> Facts:
        """How the method is trained with its options."""
        return self.options.facts()

    @property
    def trains_vision(self) -> bool:
        """Whether gradients reach the vision tower."""
        return self.facts.trains_vision

    @property
    def packable(self) -> bool:
        """Whether several such adapters can share one forward pass."""
        return self.facts.packable

    @property
    def parts(self) -> list[Adapter]:
        """The adapters that a combined method consists of; else the adapter itself."""
        return [self]

    def num_trainable(self) -> int:
        """Return the number of trainable values."""
        return sum(p.numel() for p in self.parameters())

    def modules_trainable(self) -> dict[str, int]:
        """Return the number of trainable values by parameter group of the equations."""
        return {name: p.numel() for name, p in self.named_parameters()}

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[ParameterGroup]:
        """Return AdamW groups; biases and scalars are not decayed.

        Args:
            learning_rate: peak rate of the schedule.
            weight_decay: of the decayed ones.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            decay = 0.0 if name in self.undecayed else weight_decay
            groups.setdefault((self.learning_rate_of(name, learning_rate), decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def learning_rate_of(self, parameter: str, learning_rate: float) -> float:
        """Return one parameter's learning rate, given the trial's."""
        return learning_rate

    def save_pretrained(self, folder: Path | str, extra: Mapping[str, JsonValue] | None = None) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`.

        A method that PEFT has too is written as PEFT writes it, and `hificl.json` beside it says the rest.

        Args:
            folder: made if needed.
            extra: free record kept beside the configuration (backbone name, data digest, trial key).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {self.saved_name(name): x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        record = asdict(AdapterConfig(self.name, self.options.plain(), self.backbone, dict(extra or {})))
        peft = self.peft_config()
        (folder / RECORD_FILE).unlink(missing_ok=True)  # of another that was saved here
        files = {CONFIG_FILE: record} if peft is None else {CONFIG_FILE: peft, RECORD_FILE: record}
        for name, content in files.items():
            text = json.dumps(content, indent=2, sort_keys=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")

    def saved_name(self, parameter: str) -> str:
        """Return what a parameter is called in `adapter_model.safetensors`."""
        return parameter

    def peft_config(self) -> Json | None:
        """Return what PEFT writes into `adapter_config.json`; None: it has no such method."""
        return None

    def read_weights(self, path: Path) -> None:
        """Load saved tensors in place; saved ones may be of another float dtype.

        Raises:
            InputError: the file is missing or damaged, or its tensors have other names or shapes.
        """
        self.check_weights(path)
        try:
            saved = load_file(path)
            self.load_state_dict({parameter: saved[name] for name, parameter in self._own_names(saved).items()})
        except (OSError, SafetensorError) as error:
            raise InputError(f"not readable: {error}", where=str(path)) from None

    def check_weights(self, path: Path) -> None:
        """Compare names and shapes with those in the head of a file of saved tensors; none of these is read.

        Raises:
            InputError: as `read_weights`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                saved = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError) as error:
            raise InputError(f"not readable: {error}", where=str(path)) from None
        state = self.state_dict()
        expected = {name: list(state[parameter].shape) for name, parameter in self._own_names(saved).items()}
        for name in sorted(expected.keys() | saved.keys()):
            wanted, given = (shapes.get(name, "absent") for shapes in (expected, saved))
            if wanted != given:
                problem = f"tensor {name}: the configuration asks for {wanted}, the file has {given}"
                raise InputError(problem, where=str(path))

    def _own_names(self, saved: Container[str]) -> dict[str, str]:
        """Return {name in a file: parameter}; one that was written before PEFT's layout has the parameters' names."""
        return {name if name in saved else self.saved_name(name): name for name in self.state_dict()}


# Runs states [n, D] through the decoder as it is, right before position 0; gives keys and values [L, H_kv, n, d].
Prefill = Callable[[Tensor], tuple[Tensor, Tensor]]


class AttentionAdapter(Adapter):
    """A method that adds virtual tokens to every decoder layer's attention.

    `forward()` returns them for all layers at once, so that one product per forward pass serves the whole decoder
    (and so that ZeRO-3 gathers sharded parameters at a module's call).
    """

    replaces: bool = True  # whether virtual tokens take their mass from the context (see `attention.py`)
    prefills: ClassVar[bool] = False  # whether `forward` is given a `Prefill`

    def __init__(self, options: AnyOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__(options, spec, init)
        if cap := getattr(spec.text_config, "attn_logit_softcapping", None):
            raise InputError(
                f"the attention of {spec.model_type} caps its scores at {cap:g}: no sum Z2 of exponentials is left",
                where=f"method '{self.name}'", way_out="Use a method that leaves attention alone: live, lora",
            )  # fmt: skip

    def forward(self) -> dict[str, Tensor]:
        """Return `keys` [L, H, n, d], `values` [L, H, n, d]; optional `bias` [L, H, n] and `linear` [L, H, d, d]."""
        raise NotImplementedError

    @property
    def num_virtual(self) -> int:
        """How many virtual tokens a head attends to."""
        return self()["keys"].shape[2]


class HiddenAdapter(Adapter):
    """A method that edits a state of every decoder layer: the FFN's output, attention's, or the residual stream."""

    state: Literal["mlp", "residual", "attention"] = "mlp"  # what is edited

    def forward(self) -> dict[str, Tensor]:
        """Return what `edited` takes, stacked over layers: vectors [L, D], matrices [L, D, r] or [L, r, D].

        In a pack it is padded with zeros to the widest r, which must change nothing.
        """
        raise NotImplementedError

    @staticmethod
    def edited(x: Tensor, **given: Tensor) -> Tensor:
        """Return the state x [B, T, D], in fp32, as edited by one layer's tensors; here by LIVE's `shift` [D].

        x <- (x + shift) |x| / |x + shift|. In a pack the tensors are each row's own: [B, 1, D], [B, D, r].
        """
        moved = x + given["shift"]
        norms = [torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (x, moved)]
        return moved * (norms[0] / norms[1].clamp_min(torch.finfo(x.dtype).tiny))


class WeightsAdapter(Adapter):
    """A method that updates the weights of projections."""

    def injected(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which `model` computes with the updated weights."""
        raise NotImplementedError


def parts_of(adapters: Sequence[Adapter], kind: type[Adapter]) -> Iterator[tuple[int, Any]]:
    """Yield (index of the adapter, part) for every part of one kind."""
    for index, adapter in enumerate(adapters):
        for part in adapter.parts:
            if isinstance(part, kind):
                yield index, part
