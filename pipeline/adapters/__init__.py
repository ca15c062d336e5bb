"""The methods that train: make one for a model, attach it, save it, load it.

`adapter = create("hificl", model, rank=8)`; `with attach(model, adapter): model(**batch)`;
`adapter.save_pretrained(folder)`; `adapter = load(folder, model)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.adapters.attach import attach
from pipeline.adapters.attach import wrap as put_in
from pipeline.adapters.base import (
    CONFIG_FILE,
    METHODS,
    RECORD_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    BackboneIdentity,
    HiddenAdapter,
    parts_of,
)
from pipeline.adapters.options import Facts, Options
from pipeline.adapters.pack import Pack, PackRows
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.states import modules_at
from pipeline.core.errors import InputError
from pipeline.records.store import check_adapter

MAX_CONFIG = 1 << 20  # bytes

__all__ = [
    "Adapter",
    "Facts",
    "Options",
    "Pack",
    "PackRows",
    "attach",
    "create",
    "load",
    "make",
    "names",
    "options_of",
    "read_config",
    "wrap",
]


def names() -> list[str]:
    """Return the name of every method that trains."""
    return METHODS.names()


def options_of(name: str) -> type[Options]:
    """Return a method's options: a pydantic class whose `model_fields` hold types and defaults.

    Raises:
        InputError: no such method.
    """
    return METHODS.get(name).Options


def create(name: str, model: nn.Module, *, seed: int = 0, **options: Any) -> Adapter:
    """Make an untrained adapter for a model.

    Args:
        name: the method.
        model: a transformers model; on the meta device the adapter is made there too, to be counted.
        seed: of the initial values, which depend on nothing else.
        options: the method's own.

    Returns:
        The adapter: fp32 parameters on the device of the decoder's first layer. Call its `train()` for dropout.

    Raises:
        InputError: unknown method or option, or a model without a decoder or without what the method edits.
    """
    return make(name, model, options_of(name).checked(options, name), seed=seed)


def make(
    name: str, model: nn.Module, options: Options, *, seed: int = 0, device: torch.device | None = None
) -> Adapter:
    """Make an untrained adapter from options that are checked already; else as `create`.

    Args:
        name: the method.
        model: see `create`.
        options: the method's.
        seed: of the initial values.
        device: where it goes; None: the decoder's.
    """
    method = METHODS.get(name)
    spec = decoder_of(model)
    device = device or next(spec.attentions[0].parameters()).device
    adapter = method.build(model, spec, options, seed, device).eval()
    for _, part in parts_of([adapter], HiddenAdapter):
        modules_at(spec, part.state)  # said here if this decoder has no such state, before anything is trained
    return adapter


def read_config(folder: Path | str) -> AdapterConfig:
    """Return what a saved adapter is; PEFT's own LoRA is one too.

    Raises:
        InputError: its configuration is missing or damaged, or PEFT's of something else than a plain LoRA.
    """
    folder = Path(folder)
    record = _inside(folder, RECORD_FILE)
    path = record if record.exists() else _inside(folder, CONFIG_FILE)
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise InputError(f"is larger than {MAX_CONFIG} bytes", where=str(path))
        fields = json.loads(path.read_text(encoding="utf-8"))
        if "peft_type" in fields:
            from pipeline.adapters.lora import of_peft

            return of_peft(fields, _inside(folder, WEIGHTS_FILE), str(folder))
        method, options, extra = fields["method"], fields["options"], fields.get("extra") or {}
        if not (isinstance(method, str) and isinstance(options, dict) and isinstance(extra, dict)):
            raise TypeError
        return AdapterConfig(method, options, BackboneIdentity(**fields["backbone"]), extra)
    except FileNotFoundError:
        way_out = "Give the folder that save_pretrained wrote"
        raise InputError("no such file", where=str(path), way_out=way_out) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError):
        raise InputError("not an adapter's configuration (method, options, backbone)", where=str(path)) from None


def wrap(
    model: Any,
    adapter: str | Adapter,
    *,
    processor: Any = None,
    prompt: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Make a transformers model one that trains an adapter and nothing else, in Trainer, TRL or a loop.

    Its own parameters are frozen; `save_pretrained` writes the adapter alone; `generate` and gradient checkpointing are
    transformers' own; `unwrap()` takes the adapter out again.

    Args:
        model: a transformers model; it is changed and returned.
        adapter: a method's name, of which one is made (`seed`, `options`), or an adapter.
        processor: the model's, which `ask(image, question)` needs.
        prompt: what `ask` says, with {image} and {question}; it is saved with the adapter. None: the adapter's own.
        seed: of initial values.
        options: the method's own.

    Raises:
        InputError: as `create` and `attach`, or the model is wrapped already.
    """
    if isinstance(adapter, str):
        adapter = create(adapter, model, seed=seed, **options)
    return put_in(model, adapter, processor=processor, prompt=prompt)


def load(folder: Path | str, model: nn.Module, device: torch.device | None = None) -> Adapter:
    """Read a saved adapter for the backbone that it was made for.

    Args:
        folder: what `save_pretrained` wrote, or PEFT for a LoRA.
        model: the backbone; on the meta device the adapter is read there too, unless `device` says otherwise.
        device: where it goes; None: the decoder's.

    Raises:
        InputError: files missing or damaged, or not those that the trial ended with, or another backbone.
    """
    check_adapter(Path(folder))
    config = read_config(folder)
    if config.backbone is not None:
        config.backbone.check(decoder_of(model), str(folder))
    weights = _inside(Path(folder), WEIGHTS_FILE)
    schema = options_of(config.method)
    options = schema.checked(schema.completed(config.options), config.method)
    _planned(config.method, options, model, str(folder)).check_weights(weights)
    adapter = make(config.method, model, options, device=device)
    adapter.read_weights(weights)
    adapter.extra = dict(config.extra)
    return adapter


def _planned(name: str, options: Options, model: nn.Module, where: str) -> Adapter:
    """Return the adapter on the meta device, where a shape of any size costs nothing."""
    try:
        return METHODS.get(name).build(model, decoder_of(model), options, 0, torch.device("meta"))
    except (RuntimeError, OverflowError, TypeError) as error:
        raise InputError(f"no adapter has such a shape ({str(error).splitlines()[0]})", where=where) from None


def _inside(folder: Path, name: str) -> Path:
    """Return a file of a folder that somebody may have sent; a link must not lead out of it.

    Raises:
        InputError: it does.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError("is a link that leads out of the folder", where=str(path), way_out="Put the file itself there")
    return path
