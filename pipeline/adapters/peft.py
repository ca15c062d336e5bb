"""Any tuner of the installed PEFT that changes modules, by its own configuration; PEFT computes, we own what learns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, JsonValue, ValidationInfo, field_validator
from torch import Tensor, nn

from pipeline.adapters.base import METHODS, Init, WeightsAdapter
from pipeline.adapters.options import Facts, Options, TeacherOptions
from pipeline.backbones.decoder import DecoderSpec
from pipeline.core.errors import InputError

_NAME, _LEARNING_RATE = "hificl", 5e-4
_VARIANTS: dict[str, dict[str, JsonValue]] = {  # of PEFT's LORA, called as their papers call them
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
_FACTORED = ("pissa", "olora")  # of `init_lora_weights`: those that take B_0 A_0 out of the frozen weights
_STARTS = ("gaussian", "orthogonal", *_FACTORED)  # the others look at data first
_SAID = {"target_modules": "are said by `targets` and `scope`", "layer_replication": "makes another decoder"}
_REFUSED = {
    "ADALORA": "is steered by its own calls in the training loop",
    "POLY": "asks for a task's number at every call",
    "SHADOW": "changes what flows between the layers",
    "TRAINABLE_TOKENS": "trains the embeddings of tokens",
    "XLORA": "mixes LoRAs that are trained already",
}
_FAULTS = (TypeError, ValueError, AttributeError, KeyError, NotImplementedError, RuntimeError, ImportError)


class PeftOptions(TeacherOptions):
    """Which of PEFT's tuners, its configuration as PEFT calls it, and the modules that it changes."""

    tuner: str = "dora"
    config: dict[str, JsonValue] = {}
    targets: tuple[str, ...] = Field(default=("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    scope: Literal["all", "decoder"] = "decoder"  # all: vision tower and connector too, wherever the names occur

    @field_validator("tuner")
    @classmethod
    def _known(cls, tuner: str) -> str:
        if tuner not in _VARIANTS:  # to ask PEFT takes seconds
            _type(tuner)
        return tuner

    @field_validator("config")
    @classmethod
    def _fits(cls, config: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if config and "tuner" in info.data:
            _config(info.data["tuner"], config, [])
        return config

    def facts(self) -> Facts:
        """Cross-entropy alone, or with a teacher; a tuner that PEFT computes has a pass of its own."""
        draws = self.tuner.upper() == "PVERA" or any("dropout" in name and self.config[name] for name in self.config)
        vision = self.scope == "all"
        return self.taught(Facts(learning_rate=_LEARNING_RATE, trains_vision=vision, packable=False, drops=draws))


@METHODS.register
class Peft(WeightsAdapter):
    """Any tuner of PEFT that is injected into modules: DoRA, rsLoRA, PiSSA, IA3, VeRA, OFT, ..., as PEFT computes it.

    `tuner` is PEFT's name (or a variant of LoRA by its paper's), `config` its configuration's fields; for instance
    DoRA, y = m (W + s B A) x / ||W + s B A||_c, and IA3, y = l * (W x). At the start PEFT is let put its layers into
    the model once; what is trainable in them becomes the adapter's parameters, what is drawn and fixed (VeRA's
    projections) its buffers, and the model's own modules come back. To attach is to put the layers in again and to
    lend them these. Where a start changes the frozen weights too (PiSSA, OLoRA: W - s B_0 A_0), the factors are kept.
    """

    name = "peft"
    Options: ClassVar[type[Options]] = PeftOptions
    options: PeftOptions
    seed: Tensor

    def __init__(
        self, options: PeftOptions, spec: DecoderSpec, init: Init, seed: int, names: list[str], made: _Made
    ) -> None:
        super().__init__(options, spec, init)
        self.names = names
        self.weights = nn.ParameterDict(
            {_key(name): init.place(lambda value=value: value, value.shape) for name, value in made.learnt.items()}
        )
        self.register_buffer("seed", torch.tensor(seed, device=init.device))
        self.fixed: dict[str, str] = {}  # buffer -> tensor in the model with PEFT's layers
        self.started: dict[str, tuple[str, str]] = {}  # module -> buffers with B_0 and A_0
        for name, value in made.fixed.items():
            self.fixed[name] = self._keep("fixed", name, value, init)
        for name, factors in made.started.items():
            first, second = (self._keep(part, name, x, init) for part, x in zip("ba", factors, strict=True))
            self.started[name] = first, second

    def _keep(self, kind: str, name: str, value: Tensor, init: Init) -> str:
        key = _key(f"{kind}.{name}")
        self.register_buffer(key, value.to(init.device))
        return key

    @classmethod
    def build(cls, model: nn.Module, spec: DecoderSpec, options: Any, seed: int, device: torch.device) -> Peft:
        """Let PEFT put its layers into `model` and take them out again."""
        inside = {id(module) for layer in spec.layers for module in layer.modules()}
        names = [
            name
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in options.targets and (options.scope == "all" or id(module) in inside)
        ]
        place = f"method '{cls.name}'"
        if not names:
            raise InputError(f"no module is named {' or '.join(options.targets)}", where=place)
        with _injected(model, options, names, seed, plain=device.type == "meta") as tensors:
            made = _Made.of(model, tensors, factored=_start(options) in _FACTORED)
        if made.changed:
            way_out = "Leave its config's bias at none and its layers where they are"
            problem = f"PEFT's {options.tuner.upper()} changes or trains the backbone's own weights, or edits gradients"
            raise InputError(problem, where=place, way_out=way_out)
        if not made.learnt:
            raise InputError(f"PEFT's {options.tuner.upper()} finds nothing to train", where=place)
        return cls(options, spec, Init(seed, device), seed, names, made)

    def modules_trainable(self) -> dict[str, int]:
        """Return the number of trainable values by tensor of PEFT's layers."""
        return {key.replace("/", "."): value.numel() for key, value in self.weights.items()}

    @contextmanager
    def injected(self, model: nn.Module) -> Iterator[None]:
        """Put PEFT's layers in and lend them our tensors; the model's own modules come back on leaving."""
        with _injected(model, self.options, self.names, int(self.seed) if not self.seed.is_meta else 0, plain=True):
            for key, value in self.weights.items():
                path, _, name = key.replace("/", ".").rpartition(".")
                model.get_submodule(path)._parameters[name] = value
            for tensor, buffer in self.fixed.items():
                path, _, name = tensor.rpartition(".")
                model.get_submodule(path)._buffers[name] = getattr(self, buffer)
            for module, (b, a) in self.started.items():
                layer: Any = model.get_submodule(module)
                base, scaling = layer.get_base_layer(), layer.scaling[_NAME]
                rest = _rest(base.weight, getattr(self, b), getattr(self, a), scaling)
                base._parameters["weight"] = nn.Parameter(rest, requires_grad=False)
            for tuner in _tuner_layers(model):
                tuner.train(self.training)  # the backbone never trains, so whether to drop out is the adapter's to say
            yield


def _type(tuner: str) -> Any:
    """Return PEFT's type of a tuner.

    Raises:
        ValueError: PEFT injects no such tuner, or it cannot be trained by a loss alone.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as TUNERS
    from peft.tuners.tuners_utils import BaseTuner

    name = "LORA" if tuner in _VARIANTS else tuner.upper()
    if name in _REFUSED:
        raise ValueError(f"PEFT's {name} {_REFUSED[name]}")
    types = {
        kind.value: kind
        for kind, made in TUNERS.items()
        if issubclass(made, BaseTuner) and "target_modules" in getattr(CONFIGS[kind], "__dataclass_fields__", {})
    }
    if name not in types:
        known = ", ".join(sorted(types.keys() - _REFUSED.keys()))
        raise ValueError(f"PEFT {peft.__version__} injects {known}")
    return types[name]


def _config(tuner: str, given: Mapping[str, JsonValue], modules: list[str], **over: JsonValue) -> Any:
    """Return PEFT's configuration of a tuner for modules of these names.

    Raises:
        ValueError: it does not fit.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = _type(tuner)
    fields = {**_VARIANTS.get(tuner, {}), **given, **over}
    for field, instead in _SAID.items():
        if field in fields:
            raise ValueError(f"{field} {instead}")
    start = fields.get("init_lora_weights", True)
    if not (isinstance(start, bool) or start in _STARTS):
        raise ValueError(f"init_lora_weights '{start}' looks at data first; it can be true, {', '.join(_STARTS)}")
    if kind.value == "IA3":  # scales what goes into the FFN's last matrix, and what comes out of the others
        fields.setdefault("feedforward_modules", [name for name in modules if name.endswith("down_proj")])
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=modules, **fields)
    except _FAULTS as error:
        raise ValueError(f"PEFT's {kind.value} refuses it: {_line(error)}") from None


class _Made:
    """What PEFT has put into a model: by name what learns, what is drawn and fixed, B_0 and A_0 of a changed weight."""

    def __init__(self) -> None:
        self.learnt: dict[str, Tensor] = {}
        self.fixed: dict[str, Tensor] = {}
        self.started: dict[str, tuple[Tensor, Tensor]] = {}
        self.changed = False

    @classmethod
    def of(cls, model: nn.Module, tensors: dict[int, Tensor], *, factored: bool) -> _Made:
        """Read a model with PEFT's layers in it.

        Args:
            model: it.
            tensors: its own by id, with their data of before.
            factored: whether the start takes B_0 A_0 out of the frozen weights.
        """
        made = cls()
        for name, parameter in model.named_parameters():
            if id(parameter) in tensors:
                before = tensors[id(parameter)]
                made.changed |= parameter.requires_grad or (not factored and parameter.data_ptr() != before.data_ptr())
            elif parameter.requires_grad and parameter.numel():
                made.learnt[name] = _wide(parameter)
                made.changed |= bool(parameter._backward_hooks)  # which would be those of PEFT's tensor, not of ours
        made.fixed = {name: _wide(buffer) for name, buffer in model.named_buffers() if id(buffer) not in tensors}
        for name, layer in model.named_modules() if factored else ():
            if _is_tuner(layer):
                b, a = (_wide(getattr(layer, f"lora_{part}")[_NAME].weight) for part in "BA")
                made.started[name] = b, a
        return made


@contextmanager
def _injected(
    model: nn.Module, options: PeftOptions, names: list[str], seed: int, *, plain: bool
) -> Iterator[dict[int, Tensor]]:
    """Let PEFT put its layers in, its draws by `seed` alone; all of the model is as before on leaving.

    Args:
        model: the backbone.
        options: of the method.
        names: of the modules.
        seed: of what PEFT draws.
        plain: leave the frozen weights as they are: no start that factors them.

    Yields:
        The model's own tensors of before, by the id of the parameter or buffer.

    Raises:
        InputError: PEFT refuses the model or its modules, or its layers are in it already.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    place = "method 'peft'"
    if _tuner_layers(model):
        raise InputError("PEFT's layers are in this model already", where=place, way_out="Attach one adapter of PEFT")
    factored = _start(options) in _FACTORED
    over: dict[str, JsonValue] = {"init_lora_weights": True} if plain and factored else {}
    tensors = {id(x): x.data for x in (*model.parameters(), *model.buffers())}
    had = set(vars(model))
    with _restored(model):
        if factored and not plain:  # OLoRA writes into the frozen weights
            for parameter in (p for name in names for p in model.get_submodule(name).parameters()):
                parameter.data = parameter.data.clone()
        try:
            config = _config(options.tuner, options.config, names, **over)
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name=_NAME)
        except _FAULTS as error:
            way_out = "Change its config or the targets"
            problem = f"PEFT's {options.tuner.upper()} cannot be injected: {_line(error)}"
            raise InputError(problem, where=place, way_out=way_out) from None
        finally:
            for attribute in set(vars(model)) - had:  # its configuration
                delattr(model, attribute)
        yield tensors


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give a model back its children, tensors and flags on leaving."""
    modules = [(m, dict(m._modules), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    tensors = [(p, p.data, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, *had in modules:
            places: Any = (module._modules, module._parameters, module._buffers)
            for now, before in zip(places, had, strict=True):
                now.clear()
                now.update(before)
        for parameter, data, flag in tensors:
            parameter.data = data
            parameter.requires_grad_(flag)


def _start(options: PeftOptions) -> JsonValue:
    """Return how LoRA's matrices start, where it is said."""
    return {**_VARIANTS.get(options.tuner, {}), **options.config}.get("init_lora_weights")


def _is_tuner(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _tuner_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_tuner(module)]


def _rest(weight: Tensor, b: Tensor, a: Tensor, scaling: float) -> Tensor:
    """Return W - s B A in the dtype of W, summed in fp32, as PEFT does it."""
    return (weight.detach().to(b.dtype) - scaling * (b @ a)).to(weight.dtype)


def _wide(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return copy.float() if copy.is_floating_point() else copy


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name may hold no dot


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
