"""Any tuner of the installed PEFT that changes modules, by its own configuration; PEFT computes, we own what learns.

And trained adapters as other programs hold them: in PEFT's layout, or as a module that needs this package no more.
Virtual tokens have no position, so a query at position p meets them as s R(p)q . k. PEFT's prefix of n tokens takes the
first n positions, and the same query stands at p + n; there R(p + n)q . R(n)k = R(p)q . k, so the keys are turned once,
by R(n), and all logits are the same.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, JsonValue, ValidationInfo, field_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.adapters.base import (
    CONFIG_FILE,
    METHODS,
    WEIGHTS_FILE,
    Adapter,
    AttentionAdapter,
    HiddenAdapter,
    Init,
    WeightsAdapter,
    parts_of,
)
from pipeline.adapters.options import Facts, Options, TeacherOptions, are_counted_only
from pipeline.backbones.decoder import DecoderSpec, decoder_of
from pipeline.backbones.states import modules_at
from pipeline.backbones.weights import is_quantized
from pipeline.core.errors import InputError, of_an_extra
from pipeline.core.plain_yaml import Json

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
# Of PEFT's tuners, those that are right where the frozen weights are codes of 8 or 4 bits and no numbers: they take
# what a module gives, or have a layer for such. The others read the codes as weights, and some say nothing.
_OVER_CODES = (
    "BEFT", "BOFT", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LILY", "LORA", "MISS", "OFT", "PVERA", "RANDLORA", "VERA",
)  # fmt: skip
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
        if tuner not in _VARIANTS and not are_counted_only():  # to ask PEFT takes seconds
            _type(tuner)
        return tuner

    @field_validator("config")
    @classmethod
    def _fits(cls, config: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if config and "tuner" in info.data and not are_counted_only():
            _config(info.data["tuner"], config, [])
        return config

    def facts(self) -> Facts:
        """Cross-entropy alone, or with a teacher; a tuner that PEFT computes has a pass of its own."""
        draws = self.tuner.upper() == "PVERA" or any("dropout" in name and self.config[name] for name in self.config)
        vision = self.scope == "all"
        facts = Facts(
            learning_rate=_LEARNING_RATE, trains_vision=vision, packable=False, drops=draws, reads_weights=True
        )
        return self.taught(facts)


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
    with of_an_extra():
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
    if (factored or _type(options.tuner).value not in _OVER_CODES) and is_quantized(model):
        problem = f"PEFT's {options.tuner.upper()} computes with the frozen weights, which are in 8 or 4 bits"
        raise InputError(problem, where=place, way_out="Take lora, dora, or vera, or set train.quantize to none")
    over: dict[str, JsonValue] = {"init_lora_weights": True} if plain and factored else {}
    tensors = {id(x): x.data for x in (*model.parameters(), *model.buffers())}
    cards = sorted({x.device.index for x in model.parameters() if x.device.type == "cuda"})
    had = set(vars(model))
    with _restored(model):
        if factored and not plain:  # OLoRA writes into the frozen weights
            for parameter in (p for name in names for p in model.get_submodule(name).parameters()):
                parameter.data = parameter.data.clone()
        try:
            config = _config(options.tuner, options.config, names, **over)
            _let_setuptools_in()
            with torch.random.fork_rng(cards, device_type="cuda"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name=_NAME)
        except torch.OutOfMemoryError:
            raise
        except _FAULTS as error:
            way_out = "Change its config or the targets"
            problem = f"PEFT's {options.tuner.upper()} cannot be injected: {_line(error)}"
            raise InputError(problem, where=place, way_out=way_out) from None
        finally:
            for attribute in set(vars(model)) - had:  # its configuration
                delattr(model, attribute)
        yield tensors


def _let_setuptools_in() -> None:
    """Let `setuptools` be imported, as BOFT's layers do, in a process that has looked for `pip`.

    Before Python 3.12 the finder of `distutils` leaves that name to the standard library from such a look on, and
    setuptools asserts that it has its own.
    """
    finder = getattr(sys.modules.get("_distutils_hack"), "DISTUTILS_FINDER", None)
    if finder is not None:
        vars(finder).pop("spec_for_distutils", None)


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


Form = Literal["peft", "peft-prefix", "module"]
FORMS: tuple[str, ...] = get_args(Form)
STANDALONE = "hificl_adapter.py"
_AS_MODULE = "Export it with --to module"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        kind: PEFT's type, or the class of the module.
        exact_up_to: tokens of prompt and answer up to which it computes the same; None: any number.
    """

    kind: str
    exact_up_to: int | None = None


def export(adapter: Adapter, model: nn.Module, form: Form, out: Path) -> Exported:
    """Write an adapter for programs that do not know this package.

    Args:
        adapter: on the CPU.
        model: its backbone; on the meta device it does as well.
        form: `peft` (LoRA as LoRA, virtual tokens as CARTRIDGE), `peft-prefix` (as PREFIX_TUNING), or `module`.
        out: the folder, made if needed.

    Raises:
        InputError: the form cannot hold the method exactly, and why.
    """
    spec = decoder_of(model)
    if form == "module":
        return _module(adapter, model, spec, out)
    if adapter.peft_config() is not None:
        adapter.save_pretrained(out, adapter.extra)
        return Exported("LORA")
    prefix = _prefix(adapter, spec)
    with of_an_extra():
        from peft import CartridgeConfig, PrefixTuningConfig

    out.mkdir(parents=True, exist_ok=True)
    width = spec.num_kv_heads * spec.head_dim
    sizes: dict[str, Any] = {
        "num_virtual_tokens": len(prefix), "num_layers": spec.num_layers, "num_attention_heads": spec.num_kv_heads,
        "token_dim": width, "num_transformer_submodules": 1, "task_type": "CAUSAL_LM", "inference_mode": True,
    }  # fmt: skip
    config: Any = (
        CartridgeConfig(num_frozen_tokens=0, **sizes)
        if form == "peft"
        else PrefixTuningConfig(encoder_hidden_size=width, **sizes)
    )
    save_file({"prompt_embeddings": prefix}, out / WEIGHTS_FILE, metadata={"format": "pt"})
    _write(out / CONFIG_FILE, config.to_dict())
    text = spec.text_config
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return Exported(config.peft_type.value, window and window - len(prefix))


def _prefix(adapter: Adapter, spec: DecoderSpec) -> Tensor:
    """Return PEFT's prefix, [n, 2 L H_kv d]: a layer's keys, turned, and then its values."""
    named = f"method '{adapter.name}'"
    if len(adapter.parts) > 1 or not isinstance(adapter, AttentionAdapter):
        weights = any(True for _ in parts_of([adapter], WeightsAdapter))
        way_out = "Use it with this package" if weights else _AS_MODULE
        raise InputError("PEFT has no such method, and it is no prefix", where=named, way_out=way_out)
    if adapter.prefills:
        raise InputError("its tokens are computed by the backbone", where=named, way_out="Use it with this package")
    with torch.no_grad():
        tokens = adapter()
    why = None
    if not adapter.replaces:
        why = "the context keeps its whole mass (α = 1), where a prefix takes some of it"
    elif "linear" in tokens:
        why = "its values depend on the query, and a prefix's do not"
    elif "bias" in tokens:
        why = "its virtual tokens have logits beside s q.k (a start as the identity, a gate), and a prefix's have none"
    if why is not None:
        raise InputError(why, where=named, way_out=_AS_MODULE)
    if spec.num_attentions < spec.num_layers:
        raise InputError("PEFT wants keys of every layer, and some do not attend", where=named, way_out=_AS_MODULE)
    groups = (
        tokens["keys"].unflatten(1, (spec.num_kv_heads, -1)),
        tokens["values"].unflatten(1, (spec.num_kv_heads, -1)),
    )
    if not all(torch.equal(x, x[:, :, :1].expand_as(x)) for x in groups):
        problem = f"{spec.num_heads} query heads have virtual tokens of their own, and PEFT's {spec.num_kv_heads} key"
        way_out = f"Train it with heads: kv. Or {_AS_MODULE[0].lower()}{_AS_MODULE[1:]}"
        raise InputError(f"{problem} heads have room for one a group", where=named, way_out=way_out)
    keys, values = (x[:, :, 0].float() for x in groups)
    return (
        torch.stack([_turned(keys, spec, named), values], 1).flatten(0, 1).permute(2, 0, 1, 3).flatten(1).contiguous()
    )


def _turned(keys: Tensor, spec: DecoderSpec, named: str) -> Tensor:
    """Return R(n) k, [L, H_kv, n, d], by the backbone's own rotary embedding; and see that it is one.

    Raises:
        InputError: the backbone gives positions in another way.
    """
    settings = getattr(spec.text_config, "rope_parameters", None) or {}
    rotary: Any = getattr(spec.decoder, "rotary_emb", None)
    apply: Any = getattr(sys.modules[type(spec.attentions[0]).__module__], "apply_rotary_pos_emb", None)
    plain = rotary is not None and apply is not None and len(inspect.signature(rotary.forward).parameters) == 2
    if not plain or "mrope_section" in settings or settings.get("rope_type") in ("dynamic", "longrope"):
        problem = (
            f"{spec.model_type} has no one rotary embedding for all layers and lengths that PEFT's prefixes go with"
        )
        raise InputError(problem, where=named, way_out=_AS_MODULE)
    rotary, n = type(rotary)(config=spec.text_config), keys.shape[2]

    def at(x: Tensor, position: int) -> Tensor:
        cos, sin = rotary(x, torch.full((1, x.shape[-2]), position))
        return apply(x, x, cos, sin)[1]

    turned = at(keys, n) / rotary.attention_scaling
    q = torch.randn(1, 1, 1, spec.head_dim, generator=torch.Generator().manual_seed(0))
    for position in (0, 7):
        wanted, given = (at(q, position) * keys).sum(-1), (at(q, position + n) * turned).sum(-1)
        if not torch.allclose(wanted, given, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
            problem = f"{spec.model_type} turns keys in a way that depends on more than the distance"
            raise InputError(problem, where=named, way_out=_AS_MODULE)
    return turned


def _module(adapter: Adapter, model: nn.Module, spec: DecoderSpec, out: Path) -> Exported:
    """Write the tensors that the method puts into a forward pass, and the file that computes with them."""
    if any(True for _ in parts_of([adapter], WeightsAdapter)):
        way_out = "Export it with --to peft" if adapter.peft_config() is not None else "Use it with this package"
        raise InputError("LoRA's layers are PEFT's", where=f"method '{adapter.name}'", way_out=way_out)
    kinds = [part for part in adapter.parts if isinstance(part, AttentionAdapter) and (part.prefills or part.routes)]
    kinds += [part for _, part in parts_of([adapter], HiddenAdapter) if type(part).edited is not HiddenAdapter.edited]
    if kinds:
        problem = "it computes what a module by itself does not"
        raise InputError(problem, where=f"method '{adapter.name}'", way_out="Use it with this package")
    names = {module: name for name, module in model.named_modules()}
    tensors: dict[str, Tensor] = {}
    edited: dict[str, list[str]] = {"attentions": [], "states": []}
    replaces = True
    with torch.no_grad():
        for _, part in parts_of([adapter], AttentionAdapter):
            tensors, replaces = {**tensors, **part()}, part.replaces
            edited["attentions"] = [names[module] for module in spec.attentions]
        for _, part in parts_of([adapter], HiddenAdapter):
            tensors = {**tensors, **part()}
            edited["states"] = [names[module] for module in modules_at(spec, part.state)]
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, out / "model.safetensors")
    record: Json = {"method": adapter.name, "options": adapter.options.plain(), "extra": adapter.extra}
    _write(out / "config.json", {**record, **edited, "model_type": spec.model_type, "replaces": replaces})
    shutil.copyfile(Path(__file__).with_name("standalone.txt"), out / STANDALONE)
    return Exported(STANDALONE)


def _write(path: Path, fields: Any) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
