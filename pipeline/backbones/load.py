"""From a backbone's name to a frozen model and its processor: published weights, tiny random ones, or meta tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pipeline.backbones.base import Backbone, Family, get, import_deepspeed
from pipeline.backbones.families.generic import declared
from pipeline.backbones.passes import Passes, is_out_of_memory
from pipeline.backbones.weights import (
    check_folder,
    check_quantization,
    digest_of_folder,
    digest_of_settings,
    find_folder,
    quantizable,
    quantize,
    settle,
)
from pipeline.config.schema import BackboneSource
from pipeline.core.errors import InputError, require_known

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = ("published", "tiny", "meta")
TINY_TEXT = Path(__file__).with_name("tiny_text.txt")


@dataclass(frozen=True, slots=True)
class Zero:
    """How ranks have a model's parameters in parts (ZeRO-3).

    Attributes:
        offload: `cpu`: a rank's part lies in the host's memory; `none`: on its device.
    """

    offload: str = "none"


@dataclass(slots=True)
class Loaded:
    """A backbone in memory, frozen and in eval mode.

    Attributes:
        model: the transformers model; no parameter requires a gradient.
        processor: the real processor class (None for meta).
        tokenizer: the processor's tokenizer (None for meta).
        backbone: its facts, with what its tokenizer adds to them.
        digest: sha256 (hex) over configuration, tokenizer, processor and weights; for tiny over configuration and seed.
        variant: published, tiny or meta.
        folder: where published weights came from.
        passes: how many rows go through it at once.
        quantized: how the decoder's linear weights are stored: none (as the others), int8 or nf4.
    """

    model: Any
    processor: Any
    tokenizer: Any
    backbone: Backbone
    digest: str
    variant: str = "published"
    folder: Path | None = None
    passes: Passes = field(default_factory=Passes)
    quantized: str = "none"

    @property
    def family(self) -> Family:
        """How this architecture is fed."""
        return self.backbone.family

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, of those that are numbers."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids that end a generation: the end of the text, and of a chat turn."""
        ids = [self.tokenizer.eos_token_id]
        if self.backbone.chat is not None:
            ids.append(self.tokenizer.convert_tokens_to_ids(self.backbone.chat.terminator))
        return sorted(set(ids))

    @property
    def image_token_id(self) -> int:
        """The id that stands for an image, or for one visual token of it; -1, which no token has, without images."""
        if "image" not in self.backbone.special_tokens:
            return -1
        return self.tokenizer.convert_tokens_to_ids(self.backbone.image_token)

    @property
    def never_generated(self) -> list[int]:
        """Ids that stand for images and may not appear in generated text."""
        texts = [self.backbone.special_tokens[role] for role in self.backbone.never_generated]
        return sorted({self.tokenizer.convert_tokens_to_ids(text) for text in texts})


def load(
    name: str,
    *,
    variant: Literal["published", "tiny", "meta"] | str = "published",
    weights: Path | str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    allow_download: bool = False,
    quantized: str = "none",
    zero: Zero | None = None,
) -> Loaded:
    """Load a backbone, frozen and in eval mode.

    Args:
        name: a registered backbone.
        variant: `published` reads safetensors in the published layout; `tiny` builds the same architecture with all
            sizes cut and random weights; `meta` builds the real configuration without memory, for counting.
        weights: a local folder; None: `checkpoints/<name>` for a miniature, the hub's cache for a published one.
        revision: the hub's revision.
        dtype: type of the parameters, or its name (fp32, bf16, fp16).
        device: where they go.
        seed: of the tiny variant's random weights.
        allow_download: whether the hub may be asked for what the cache lacks.
        quantized: none; int8 or nf4: the decoder's linear weights are stored so (`weights.quantize`), and the whole
            model is never held wider.
        zero: how the process group's ranks share the parameters out among them; each of them loads. None: they do not.

    Raises:
        InputError: an unknown name, variant or dtype; weights that are missing, pickled, damaged or another model's;
            a package that few bits need is missing.
    """
    place = (weights, revision, dtype, device, seed, quantized, zero)
    return _loaded(get(name), variant, *place, allow_download=allow_download)


def load_from(
    name: str, source: BackboneSource, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu",
    quantized: str = "none", zero: Zero | None = None,
) -> Loaded:  # fmt: skip
    """Load a backbone from where its settings say, as `load` does; `dtype` None: that of the settings."""
    kind = source.dtype if dtype is None else dtype
    place = (source.weights, source.revision, kind, device, source.seed, quantized, zero)
    return _loaded(of(name, source), source.variant, *place)


def of(name: str, source: BackboneSource) -> Backbone:
    """Return a backbone by its name and what its settings say."""
    return declared(name, source) if source.hub else get(name)


def reads_images(name: str) -> bool:
    """Tell whether a backbone has a vision tower; of one by name, from its config.json.

    Raises:
        InputError: an unknown name; or a folder, or a repository of the hub, that is not here or cannot be adapted.
    """
    backbone = get(name)
    if backbone.family.by_name:
        backbone.family.config_in(find_folder(backbone, None, None))
    return backbone.family.reads_images


def _loaded(
    backbone: Backbone, variant: str, weights: Path | str | None, revision: str | None, dtype: torch.dtype | str,
    device: torch.device | str, seed: int, quantized: str, zero: Zero | None, *, allow_download: bool = False,
) -> Loaded:  # fmt: skip
    require_known("variant", variant, VARIANTS, f"backbones.{backbone.name}.variant")
    kind = _dtype(dtype, backbone.name)
    check_quantization(quantized, f"backbone {backbone.name}")
    if quantized != "none" and zero is not None:
        problem = f"weights in {quantized} are not shared out among ranks"
        raise InputError(problem, where=f"backbone {backbone.name}", way_out="Set train.zero_stage to 2")
    if variant == "tiny":
        loaded = _tiny(backbone, seed=seed, dtype=kind, device=device, zero=zero)
    elif variant == "meta":
        folder = find_folder(backbone, weights, revision) if backbone.family.by_name else None
        loaded = _meta(backbone, folder)
    else:
        folder = find_folder(backbone, weights, revision, allow_download=allow_download)
        return _published(backbone, folder, dtype=kind, device=device, quantized=quantized, zero=zero)
    if quantized != "none":
        quantize(loaded.model, quantized)
    return replace(loaded, quantized=quantized)


def digest_of(name: str, source: BackboneSource) -> str:
    """Return the digest that `load` of this source would carry, without building the model.

    Raises:
        InputError: as `load`, where the weights are missing or another model's.
    """
    backbone = of(name, source)
    if source.variant == "tiny":
        return _tiny_digest(backbone, source.seed)
    folder = find_folder(backbone, source.weights, source.revision)
    check_folder(backbone, folder)
    return digest_of_folder(folder, backbone)


def _dtype(dtype: torch.dtype | str, name: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    require_known("dtype", dtype, DTYPES, f"backbones.{name}.dtype")
    return DTYPES[dtype]


def _meta(backbone: Backbone, folder: Path | None) -> Loaded:
    family = backbone.family
    config = family.config_in(folder) if folder else family.build_config(backbone.config_for("meta"))
    with torch.device("meta"):
        model = family.model_class(config)
    backbone = family.known(backbone, model)
    return Loaded(_frozen(model), None, None, backbone, _meta_digest(backbone), "meta")


def _meta_digest(backbone: Backbone) -> str:
    return digest_of_settings({"backbone": backbone.name, "variant": "meta", "config": backbone.config_for("meta")})


def tiny_lines() -> list[str]:
    """Return the committed text that tiny tokenizers are trained on."""
    return TINY_TEXT.read_text(encoding="utf-8").splitlines()


def _tiny(
    backbone: Backbone, *, seed: int, dtype: torch.dtype, device: torch.device | str, zero: Zero | None
) -> Loaded:
    family, special = backbone.family, backbone.special_tokens
    tokenizer = family.train_tokenizer([line + "\n" for line in tiny_lines()], special)
    processing = backbone.processor_for("tiny")
    settings = family.fit_vocabulary(backbone.config_for("tiny"), tokenizer, special)
    processor = family.build_processor(tokenizer, processing)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.model_class(family.build_config(settings))
    model = model.to(device=device, dtype=dtype)
    if zero is not None:
        share_out = _sharing(zero)
        for parameter in model.parameters():
            share_out(parameter)
    digest, passes = _tiny_digest(backbone, seed), Passes(together=zero is not None)
    return _ready(Loaded(model, processor, processor.tokenizer, backbone, digest, "tiny", passes=passes))


def _tiny_digest(backbone: Backbone, seed: int) -> str:
    return digest_of_settings(
        {
            "backbone": backbone.name, "variant": "tiny", "seed": seed, "text": tiny_lines(),
            "config": backbone.config_for("tiny"), "processor": backbone.processor_for("tiny"),
        }
    )  # fmt: skip


def _published(
    backbone: Backbone,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantized: str,
    zero: Zero | None,
) -> Loaded:
    from safetensors import SafetensorError

    check_folder(backbone, folder)
    family = backbone.family
    if quantized != "none" and family.gguf is not None:
        way_out = "Give a folder with safetensors, or set train.quantize to none"
        raise InputError(f"weights of GGUF are not stored in {quantized}", where=str(folder), way_out=way_out)
    way_out = f"Download {backbone.hub_id} again" if backbone.hub_id else "Make the miniature again: dvc repro backbone"
    if family.by_name:
        way_out = "Give a whole folder in the hub's layout, and install what it asks for"
    try:
        processor = family.load_processor(folder, backbone.processor_for("published"))
        # straight from the mapped files to a card: eight slots of a node would else hold eight copies in its memory
        placed: dict[str, Any] = {"device_map": {"": torch.device(device)}}
        if quantized != "none":
            placed["quantization_config"] = _bits(family, folder, quantized, dtype)
        elif zero or torch.device(device).type == "cpu":
            placed = {}
        with nullcontext() if zero is None else _shared_out(zero):
            model, report = family.load_model(folder, dtype=dtype, output_loading_info=True, **placed)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if is_out_of_memory(error):  # no fault of the weights: another process may have the room
            raise
        problem = f"cannot be loaded as {backbone.name}: {' '.join(str(error).split())[:300]}"
        raise InputError(problem, where=str(folder), way_out=way_out) from error
    if report["missing_keys"]:
        # transformers would fill these with random numbers and say so only in a warning
        missing = sorted(report["missing_keys"])
        problem = f"{len(missing)} parameters of {backbone.name} are not in the weights, such as {missing[0]}"
        raise InputError(problem, where=str(folder), way_out=way_out)
    settle(model)
    model = _frozen(model if placed else model.to(device))
    backbone = family.known(backbone, model, processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    digest, passes = digest_of_folder(folder, backbone), Passes(together=zero is not None)
    return _ready(Loaded(model, processor, tokenizer, backbone, digest, "published", folder, passes, quantized))


@contextmanager
def _shared_out(zero: Zero) -> Iterator[None]:
    """Let every parameter that is read from a file inside the block leave its rank's share behind.

    One is whole at a time: a file is mapped into memory, and what is read of it is registered in a module, at which it
    is shared out. What transformers has set up before has no memory (meta), and what it adds for a parameter that the
    file lacks is an error of the caller's.
    """
    share_out = _sharing(zero)

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if getattr(parameter, "_is_hf_initialized", False):  # which transformers says of what it has read
            share_out(cast("nn.Parameter", parameter))

    hook = register_module_parameter_registration_hook(registered)
    try:
        # by threads, transformers would read tensors ahead of the one that is shared out
        with patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
            yield
    finally:
        hook.remove()


def _sharing(zero: Zero) -> Callable[[nn.Parameter], None]:
    """Return what makes a whole parameter one that DeepSpeed's stage 3 has in parts, the first rank's values."""
    some = nn.Linear(1, 1, bias=False)  # by a parameter of its own DeepSpeed takes up others
    place = "cpu" if zero.offload == "cpu" else None
    import_deepspeed().zero.Init(module=some, remote_device=place, mem_efficient_linear=False)  # the engine's to change
    convert: Any = some.weight

    @torch.no_grad()
    def share_out(parameter: nn.Parameter) -> None:
        if hasattr(parameter, "ds_id"):  # tied to another
            return
        if parameter.data.untyped_storage().nbytes() > parameter.nbytes:  # of a mapped file, which is not written to
            parameter.data = parameter.data.clone()
        convert.convert_to_zero_parameters([parameter])

    return share_out


def _bits(family: Family, folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """Return transformers' way to store each weight in few bits as it is read, for those that `quantize` takes."""
    from transformers import AutoConfig, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        way_out = "Set train.quantize to none, which takes them as they are"
        raise InputError("its weights are stored in few bits already", where=str(folder), way_out=way_out)
    with torch.device("meta"):
        model = family.model_class(config)
    taken = quantizable(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in taken]
    return BitsAndBytesConfig(
        load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4", llm_int8_skip_modules=names,
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip


def _ready(loaded: Loaded) -> Loaded:
    from transformers import GenerationConfig

    tokenizer = loaded.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = loaded.backbone.special_tokens["pad"]
    # A tokenizer knows more than the roles: tools, spare ones, and Idefics2's end of a turn, for which there is no row.
    loaded.backbone = replace(loaded.backbone, added_tokens=tuple(sorted(tokenizer.get_added_vocab())))
    # The published generation settings may sample; ours decode deterministically unless a caller says otherwise.
    loaded.model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=loaded.eos_token_ids, pad_token_id=tokenizer.pad_token_id
    )
    _frozen(loaded.model)
    return loaded


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


__all__ = ["DTYPES", "Loaded", "Zero", "digest_of", "load", "load_from", "of", "tiny_lines"]
