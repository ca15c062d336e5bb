"""LoRA, as PEFT computes it, its parameters lent to PEFT's layers; and the whole update of a connector's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.adapters.base import METHODS, AdapterConfig, Init, WeightsAdapter
from pipeline.adapters.options import Facts, Options, TeacherOptions
from pipeline.backbones.decoder import DecoderSpec, check_hooks, eager
from pipeline.core.errors import InputError, of_an_extra
from pipeline.core.plain_yaml import Json

_NAME = "hificl"
_LEARNING_RATE = 5e-4
_PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
# Of PEFT's configuration: what is read, and what decides nothing once the tensors are there.
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}
_IDLE = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
}  # fmt: skip
# What stands between vision tower and decoder, as transformers' models call it.
_CONNECTORS = (
    "multi_modal_projector", "connector", "merger", "deepstack_merger_list", "perceiver_resampler",
    "gated_cross_attn_layers", "embed_vision", "aligner",
)  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the backbone's weights too


class LoRAOptions(TeacherOptions):
    """LoRA's options; alpha is 2 r unless given."""

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    # linear modules by the end of their dotted names, as PEFT reads them
    targets: tuple[str, ...] = Field(default=("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    scope: Literal["all", "decoder"] = "all"  # all: vision tower and connector too, wherever the names occur

    def facts(self) -> Facts:
        """Cross-entropy alone; with a teacher, MimIC's alignment and half of it (MimIC Table 11)."""
        facts = Facts(learning_rate=_LEARNING_RATE, trains_vision=self.scope == "all", drops=self.dropout > 0)
        return self.taught(facts)


class LoRAMiniOptions(LoRAOptions):
    """LoRA dagger of MimIC's tables: the decoder's output projections alone, rank 1."""

    rank: int = Field(default=1, ge=1)
    targets: tuple[str, ...] = Field(default=("o_proj",), min_length=1)
    scope: Literal["all", "decoder"] = "decoder"


@METHODS.register
class LoRA(WeightsAdapter):
    """y = W x + (alpha / r) B A dropout(x) on every linear module of the target names (LoRA Eq. 3, PEFT's layers).

    A as PEFT draws it (Kaiming uniform), B = 0. `out_proj` of a vision tower is not a target.
    """

    name = "lora"
    Options: ClassVar[type[Options]] = LoRAOptions
    options: LoRAOptions

    def __init__(
        self, options: LoRAOptions, spec: DecoderSpec, init: Init, targets: dict[str, tuple[int, int]]
    ) -> None:
        super().__init__(options, spec, init)
        r = options.rank
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for module, (wide_in, wide_out) in targets.items():
            key = module.replace(".", "/")  # a parameter's name may hold no dot
            self.a[key] = init.place(lambda shape=(r, wide_in): _kaiming(shape, init.generator), (r, wide_in))
            self.b[key] = init.full(wide_out, r)

    @classmethod
    def build(cls, model: nn.Module, spec: DecoderSpec, options: Any, seed: int, device: torch.device) -> LoRA:
        """Make the adapter for every target module of `model`."""
        targets = _targets(model, spec, options)
        if not targets:
            raise InputError(f"no linear module is named {' or '.join(options.targets)}", where=f"method '{cls.name}'")
        return cls(options, spec, Init(seed, device), targets)

    def modules_trainable(self) -> dict[str, int]:
        """Return the number of trainable values by module."""
        return {key.replace("/", "."): self.a[key].numel() + self.b[key].numel() for key in self.a}

    @property
    def scaling(self) -> float:
        """The factor alpha / r on the update."""
        return (self.options.alpha or 2 * self.options.rank) / self.options.rank

    def module_names(self) -> list[str]:
        """Return the names of the modules that are updated."""
        return [key.replace("/", ".") for key in self.a]

    def matrices(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [r, in] and B [out, r] of one module."""
        key = module.replace(".", "/")
        return self.a[key], self.b[key]

    def saved_name(self, parameter: str) -> str:
        """Return PEFT's name: `base_model.model.MODULE.lora_A.weight`."""
        matrix, _, key = parameter.partition(".")
        return f"base_model.model.{key.replace('/', '.')}.lora_{matrix.upper()}.weight"

    def peft_config(self) -> Json:
        """Return PEFT's configuration of the same, which names every module."""
        fields = {**self._config().to_dict(), "inference_mode": True, "task_type": "CAUSAL_LM"}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    def _config(self) -> Any:
        with of_an_extra():
            from peft import LoraConfig

        rank = self.options.rank
        return LoraConfig(
            r=rank,
            lora_alpha=self.options.alpha or 2 * rank,
            lora_dropout=self.options.dropout,  # type: ignore[arg-type]
            target_modules=self.module_names(),
            bias="none",
        )

    @contextmanager
    def injected(self, model: nn.Module) -> Iterator[None]:
        """Let PEFT put its layers in, lend them our parameters, and put the model's own modules back on leaving."""
        with of_an_extra():
            from peft import inject_adapter_in_model

        names = self.module_names()
        modules = dict(model.named_modules())
        for name in names:
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise InputError(
                    f"the model has no plain linear module {name}",
                    where=f"method '{self.name}'",
                    way_out="Attach LoRA once, to the backbone that it was made for",
                )
        before, had = {name: modules[name] for name in names}, set(vars(model))
        try:
            inject_adapter_in_model(self._config(), model, _NAME, low_cpu_mem_usage=True)
            for name in before:
                layer: Any = model.get_submodule(name)
                layer.lora_A[_NAME].weight = self.a[name.replace(".", "/")]
                layer.lora_B[_NAME].weight = self.b[name.replace(".", "/")]
                layer.train(self.training)  # the backbone never trains, so whether to drop out is the adapter's to say
            yield
        finally:
            for name, linear in before.items():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, linear)
            for attribute in set(vars(model)) - had:
                delattr(model, attribute)


@METHODS.register
class LoRAMini(LoRA):
    """LoRA on the decoder's output projections alone, rank 1 (MimIC Table 11)."""

    name = "lora-mini"
    Options: ClassVar[type[Options]] = LoRAMiniOptions


class ConnectorOptions(TeacherOptions):
    """What the connector is called: a part of its modules' dotted names."""

    modules: tuple[str, ...] = Field(default=_CONNECTORS, min_length=1)

    def facts(self) -> Facts:
        """Cross-entropy alone, or with a teacher; pictures go through the connector at every step."""
        return self.taught(Facts(learning_rate=1e-4, trains_vision=True, packable=False))


@METHODS.register
class Connector(WeightsAdapter):
    """y = (W + D) x + b + c on every linear module between vision tower and decoder (connector tuning).

    D = 0, c = 0 (where there is a bias) at the start: the connector's own weights are trained whole, everything else is
    frozen, norms and queries of a resampler too. In Zhou et al. 2024 (arXiv 2406.05130) it goes with other methods or
    stands alone. Trainable: the values of these modules.
    """

    name = "connector"
    Options: ClassVar[type[Options]] = ConnectorOptions
    seed: torch.Tensor

    def __init__(
        self, options: ConnectorOptions, spec: DecoderSpec, init: Init, linears: dict[str, nn.Linear], seed: int
    ) -> None:
        super().__init__(options, spec, init)
        self.register_buffer("seed", torch.tensor(seed, device=init.device))  # which draws nothing here
        self.weight, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for module, linear in linears.items():
            key = module.replace(".", "/")
            self.weight[key] = init.full(linear.out_features, linear.in_features)
            if linear.bias is not None:
                self.bias[key] = init.full(linear.out_features)

    @classmethod
    def build(cls, model: nn.Module, spec: DecoderSpec, options: Any, seed: int, device: torch.device) -> Connector:
        """Make the adapter for every linear module of the connector."""
        inside = {id(module) for layer in spec.layers for module in layer.modules()}
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module) not in inside and set(name.split(".")) & {*options.modules}
        }
        if not linears:
            problem = f"{type(model).__name__} has no linear module in {', '.join(options.modules)}"
            raise InputError(problem, where=f"method '{cls.name}'", way_out="Name its connector in `modules`")
        return cls(options, spec, Init(seed, device), linears, seed)

    def modules_trainable(self) -> dict[str, int]:
        """Return the number of trainable values by module."""
        biases = {key: bias.numel() for key, bias in self.bias.items()}
        return {key.replace("/", "."): x.numel() + biases.get(key, 0) for key, x in self.weight.items()}

    @contextmanager
    def injected(self, model: nn.Module) -> Iterator[None]:
        """Add D x + c to what the modules give."""
        keys = {model.get_submodule(key.replace("/", ".")): key for key in self.weight}

        def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            weight, bias = self.weight[keys[module]], self.bias.get(keys[module])
            return output + nn.functional.linear(args[0].to(weight.dtype), weight, bias).to(output.dtype)

        check_hooks(model.modules(), keys)
        hook = eager(add)
        handles = [module.register_forward_hook(hook) for module in keys]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _targets(model: nn.Module, spec: DecoderSpec, options: LoRAOptions) -> dict[str, tuple[int, int]]:
    """Return {module: (inputs, outputs)} of every linear module that a target names."""
    inside = {id(module) for layer in spec.layers for module in layer.modules()}
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and f".{name}".endswith(tuple(f".{target}" for target in options.targets))
        and (options.scope == "all" or id(module) in inside)
    }


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def of_peft(fields: Json, weights: Path, where: str) -> AdapterConfig:
    """Return what an adapter of PEFT's own is here: its rank and scale, and the modules that its tensors name.

    Args:
        fields: its `adapter_config.json`.
        weights: its tensors; their names alone are read.
        where: the folder.

    Raises:
        InputError: no LoRA, or one with something that this LoRA does not have.
    """
    with of_an_extra():
        from peft import LoraConfig

    if fields["peft_type"] != "LORA":
        raise InputError(f"PEFT's {fields['peft_type']} is no method here", where=where, way_out="Give PEFT's LORA")
    plain = {**LoraConfig().to_dict(), "lora_bias": False}
    for name, value in fields.items():
        usual = plain.get(name)
        start = name == "init_lora_weights" and value in _PLAIN_STARTS
        if not (start or name in _READ | _IDLE or value == usual or (not value and not usual)):
            problem = f"PEFT's LoRA with {name} {value!r} is not one of this package's"
            raise InputError(problem, where=where, way_out="Load it with PEFT, or merge it into the backbone")
    try:
        with safe_open(weights, framework="pt") as file:
            names = [_PEFT_NAME.fullmatch(name) for name in file.keys()]  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as error:
        raise InputError(f"not readable: {error}", where=str(weights)) from None
    rank: Any = fields["r"]
    alpha: Any = fields["lora_alpha"]
    options: Json = {
        "rank": rank, "alpha": alpha * (rank**0.5 if fields.get("use_rslora") else 1),
        "dropout": fields.get("lora_dropout", 0.0), "targets": sorted({name[1] for name in names if name}),
    }  # fmt: skip
    return AdapterConfig(LoRA.name, options, None, {})
