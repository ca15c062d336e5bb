"""Attach adapters to a transformers model for the length of a `with` block, several at once where they pack; or `wrap`.

Attention is edited through one function that is registered with transformers: every decoder calls it after RoPE and
cache update, and it looks up the edit of the module that calls. Modules without one (cross-attention, other models that
share the configuration) run plain SDPA. The mask function of the same name is SDPA's, so causality, padding and sliding
windows arrive as a mask.

A wrapped model stays the object that it is, of a class that derives from its own: forward, generate, gradient
checkpointing and what a trainer reads off a model are transformers' own. What it adds is in `Wrapped`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pipeline.adapters.base import Adapter, AttentionAdapter, HiddenAdapter, WeightsAdapter, parts_of
from pipeline.adapters.edits import AttentionEdit, HiddenEdit, WeightsEdit, edited_weights
from pipeline.adapters.pack import Pack, PackRows, joined
from pipeline.attention.kernels import prepare_mask
from pipeline.backbones.decoder import DecoderSpec, check_hooks, decoder_of, eager, is_eager
from pipeline.backbones.states import modules_at
from pipeline.core.errors import InputError

_FROZEN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_HIDDEN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
NAME = "hificl"
_UNSUPPORTED = ("softcap", "position_bias")  # they change the scores, and with them Z2


@contextmanager
def attach(
    model: nn.Module, adapter: Adapter | Sequence[Adapter] | Pack, rows: PackRows | Sequence[int] | None = None
) -> Iterator[Pack]:
    """Let `model` compute with the adapter inside the block; on leaving, everything is as it was.

    Inside, the backbone's parameters are frozen, and gradients reach the adapter's alone. Blocks may be nested where
    they edit different things (an adapter of attention inside LoRA).

    Args:
        model: a transformers model.
        adapter: one adapter, several that pack, or a `Pack`.
        rows: see `Pack`.

    Yields:
        The pack; `Pack.use` names the rows before every step.

    Raises:
        InputError: the adapter was made for another backbone, or the same place is edited already.
    """
    if isinstance(adapter, Pack):
        pack = adapter
        if rows is not None:
            pack.use(rows)
    else:
        pack = Pack(adapter, rows)
    spec = decoder_of(model)
    for member in pack.adapters:
        member.backbone.check(spec, f"method '{member.name}'")
    attention = dict(parts_of(pack.adapters, AttentionAdapter))
    hidden = list(parts_of(pack.adapters, HiddenAdapter))
    weights = dict(parts_of(pack.adapters, WeightsAdapter))
    check_hooks(model.modules(), [spec.decoder])  # which begins every pass anew
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(_no_trainer_without(spec.decoder, pack))
        if len(pack.adapters) == 1:  # PEFT's own layers
            for part in weights.values():
                stack.enter_context(part.injected(model))
        elif weights:
            stack.enter_context(edited_weights(model, WeightsEdit(weights, pack, spec)))
        if pack.apart:
            edits = {
                i: AttentionEdit({0: part}, Pack(pack.adapters[i]), spec, partial(_prefill, spec))
                for i, part in attention.items()
            }
            stack.enter_context(_apart_attention(spec, edits, pack))
        elif attention:
            stack.enter_context(_edited_attention(spec, AttentionEdit(attention, pack, spec, partial(_prefill, spec))))
        if hidden:
            stack.enter_context(_edited_hidden(spec, hidden, pack))
        yield pack


@contextmanager
def _no_trainer_without(decoder: nn.Module, pack: Pack) -> Iterator[None]:
    """Refuse, at the first pass with a gradient, a Trainer of the model alone: it would train nothing and say nothing.

    Every parameter of the model is frozen, and a Trainer reads off its model what it trains; who calls is on the stack.
    """

    def check(module: nn.Module, args: object) -> None:
        if not torch.is_grad_enabled() or "transformers.trainer" not in sys.modules:
            return
        handle.remove()
        frame, learnt = sys._getframe(), {id(parameter) for part in pack.adapters for parameter in part.parameters()}
        while (frame := frame.f_back) is not None:  # type: ignore[assignment]
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, sys.modules["transformers.trainer"].Trainer):
                if learnt.isdisjoint(map(id, trainer.model.parameters())):
                    problem = "the Trainer's model has none of the adapter's parameters, so nothing would be trained"
                    raise InputError(problem, where="attach", way_out="Train adapters.wrap(model, adapter)")
                return

    handle = decoder.register_forward_pre_hook(eager(check))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze the model's parameters; the outermost block does it, for inside it they may be another adapter's."""
    if model in _FROZEN:
        yield
        return
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    _FROZEN[model] = True
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        _FROZEN.pop(model, None)  # the model itself may be on its way out


@contextmanager
def _edited_attention(spec: DecoderSpec, edit: AttentionEdit) -> Iterator[None]:
    # Parameters change between steps, so the virtual tokens are computed anew at the start of every forward pass; not
    # for every decoded token.
    def refresh(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        edit.refresh(continues=_continues(kwargs))

    with edited_attention(spec, edit.layers), _hooks() as hooks:
        hooks.append(spec.decoder.register_forward_pre_hook(eager(refresh), with_kwargs=True))
        yield


@contextmanager
def _apart_attention(spec: DecoderSpec, edits: Mapping[int, AttentionEdit], pack: Pack) -> Iterator[None]:
    """Let each adapter's rows attend by themselves, with its own edit or as the model does."""

    def refresh(module: nn.Module, args: object) -> None:
        for edit in edits.values():
            edit.refresh()

    masks = _Masks(pack)
    layers = range(spec.num_attentions)
    parts = [_Apart(pack, {i: edit.layers[layer] for i, edit in edits.items()}, masks) for layer in layers]
    with edited_attention(spec, parts), _hooks() as hooks:
        hooks.append(spec.decoder.register_forward_pre_hook(eager(refresh)))
        yield


def _continues(kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass goes on behind a cache and learns nothing."""
    cache = kwargs.get("past_key_values")
    return cache is not None and not torch.is_grad_enabled() and int(cache.get_seq_length()) > 0


@contextmanager
def _edited_hidden(spec: DecoderSpec, parts: Sequence[tuple[int, HiddenAdapter]], pack: Pack) -> Iterator[None]:
    if spec.decoder in _HIDDEN:
        way_out = "Leave the first `attach`, or give both to one `attach` with rows"
        raise InputError("an adapter of hidden states is attached to this model already", way_out=way_out)
    _HIDDEN[spec.decoder] = True
    kinds: dict[tuple[str, Any], dict[int, HiddenAdapter]] = {}  # by what is edited, and how
    for index, part in parts:
        kinds.setdefault((part.state, part.edited), {})[index] = part
    try:
        with _hooks() as hooks:
            for of_kind in kinds.values():
                modules = modules_at(spec, next(iter(of_kind.values())).state)
                check_hooks([spec.decoder, *spec.layers], modules)
                edit = HiddenEdit(of_kind, pack, modules)
                hooks.append(spec.decoder.register_forward_pre_hook(eager(edit.before)))
                hook = eager(edit.after)
                for module in modules:
                    # first in line, so that whoever records hidden states sees the edited one
                    hooks.append(module.register_forward_hook(hook, prepend=True))
            yield
    finally:
        _HIDDEN.pop(spec.decoder, None)


def _prefill(spec: DecoderSpec, states: Tensor) -> tuple[Tensor, Tensor]:
    """Run states [n, D] through the decoder as it is; see `Prefill`. They stand at the positions -n to -1."""
    from transformers import DynamicCache

    like = next(parameter for parameter in spec.decoder.parameters() if parameter.is_floating_point())
    rows, cache = states.to(like.device, like.dtype)[None], DynamicCache()
    positions = torch.arange(-len(states), 0, device=like.device)[None]
    with _as_it_is(spec):
        # not by a call: who listens to the decoder, or changes what it is given, means the pass that is to come
        spec.decoder.forward(inputs_embeds=rows, position_ids=positions, past_key_values=cache, use_cache=True)
    kept = [cache.layers[attention.layer_idx] for attention in spec.attentions]
    keys, values = (torch.stack([getattr(layer, name)[0] for layer in kept]) for name in ("keys", "values"))
    return keys.to(states.dtype), values.to(states.dtype)


@contextmanager
def _as_it_is(spec: DecoderSpec) -> Iterator[None]:
    """Let a decoder compute inside the block without the edits, hooks and checkpoints of this project."""
    edits = {module: _EDITS.pop(module) for module in spec.attentions if module in _EDITS}
    tables: list[tuple[Any, dict[int, Any]]] = []
    for module in spec.decoder.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            if any(map(is_eager, table.values())):
                tables.append((table, dict(table)))
    forwards = {
        layer: vars(layer)["forward"] for layer in spec.layers if isinstance(vars(layer).get("forward"), partial)
    }
    try:
        for table, hooks in tables:
            for number, hook in hooks.items():
                if is_eager(hook):
                    del table[number]
        for layer in forwards:
            del layer.forward
        yield
    finally:
        for table, hooks in tables:
            table.clear()
            table.update(hooks)
        for layer, forward in forwards.items():
            layer.forward = forward  # type: ignore[assignment]
        _EDITS.update(edits)


@contextmanager
def _hooks() -> Iterator[list[torch.utils.hooks.RemovableHandle]]:
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


# edit(q, k, v, mask, scale=, causal=) -> [B, H, T, d]
LayerEdit = Callable[..., Tensor]


class _Masks:
    """Each adapter's part of a mask, made once for all layers: they are handed the same tensor."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self._made: tuple[object, Tensor, list[Tensor]] | None = None

    def __call__(self, mask: Tensor | None) -> list[Tensor | None]:
        """Return the parts of a mask [B or 1, H or 1, T, T] in the rows' order."""
        if mask is None:
            return [None] * len(set(self.pack.numbers))
        if self._made is None or self._made[0] is not self.pack.rows or self._made[1] is not mask:
            whole = mask.expand(len(self.pack.numbers), -1, -1, -1)
            parts = [part[..., : part.shape[2]] for _, part in self.pack.split(whole, tokens=2)]
            self._made = (self.pack.rows, mask, parts)
        return list(self._made[2])


@dataclass(frozen=True)
class _Apart:
    """What stands in the place of an edit where each adapter's rows attend by themselves."""

    pack: Pack
    edits: Mapping[int, LayerEdit]  # by the adapter's number
    masks: _Masks


_EDITS: WeakKeyDictionary[nn.Module, LayerEdit | _Apart] = WeakKeyDictionary()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with the edit of `module`; the signature and the returned [B, T, H, d] are transformers'."""
    edit = _EDITS.get(module)
    if not isinstance(edit, _Apart):
        return _attend(
            edit, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal,
            **kwargs,
        )  # fmt: skip
    rows = zip(*(edit.pack.split(x, tokens=2) for x in (query, key, value)), edit.masks(attention_mask), strict=True)
    attended = [
        _attend(
            edit.edits.get(number), module, q, k, v, mask, scaling=scaling, dropout=dropout, is_causal=is_causal,
            **kwargs,
        )[0]
        for (number, q), (_, k), (_, v), mask in rows
    ]  # fmt: skip
    return joined(attended, query.shape[2]), None


def _attend(
    edit: LayerEdit | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float | None, dropout: float, is_causal: bool | None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if edit is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )
    if dropout > 0:
        raise InputError("attention dropout is not defined for edited attention", way_out="Call model.eval()")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise InputError(f"attention with '{name}' cannot be edited")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    queries = query.shape[2]
    if attention_mask is None and causal and 1 < queries < key.shape[2]:
        # transformers leaves the mask out here only for the prefill of an empty static cache
        key, value = key[:, :, :queries], value[:, :, :queries]
    if kwargs.get("s_aux") is not None:
        key, value, attention_mask = _with_sinks(query, key, value, attention_mask, kwargs["s_aux"], causal=causal)
    output = edit(query, key, value, attention_mask, scale=scaling, causal=causal)
    return output.transpose(1, 2).contiguous(), None


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Write each head's sink, a logit that takes mass and gives nothing, as one more key of zeros: Z2 holds it then.

    Returns:
        Keys and values [B, H_kv, S + 1, d], and the additive mask [.., H, T, S + 1] with the sinks in its last column.
    """
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device)
        mask = (mask.tril(keys - tokens) if causal else mask)[None, None]
    prepared = prepare_mask(mask, query.dtype)
    shape = (prepared.bias.shape[0], len(sinks), tokens)
    column = sinks.to(query.dtype).view(1, -1, 1, 1).expand(*shape, 1)
    if prepared.dead is not None:  # a padded row sees nothing at all
        column = column.masked_fill(prepared.dead[..., None], float("-inf"))
    bias = torch.cat([prepared.bias.expand(*shape, keys), column], -1)
    return torch.nn.functional.pad(key, (0, 0, 0, 1)), torch.nn.functional.pad(value, (0, 0, 0, 1)), bias


@cache
def _register() -> None:
    """Make the function known to transformers: at its first use, since to import it takes seconds.

    A sweep's stage and driver know methods by name and never attend.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, eager(attention_forward))
    AttentionMaskInterface.register(NAME, sdpa_mask)


def is_edited(spec: DecoderSpec) -> bool:
    """Whether the attention of some layer is edited."""
    return any(module in _EDITS for module in spec.attentions)


@contextmanager
def edited_attention(spec: DecoderSpec, edits: Sequence[LayerEdit | _Apart]) -> Iterator[None]:
    """Give each layer's attention its edit, and set the text configuration to call it; undone on leaving.

    Raises:
        InputError: the attention of this model is edited already.
    """
    if is_edited(spec):
        way_out = "Leave the first `attach`, or give both to one `attach` with rows"
        raise InputError("an adapter of attention is attached to this model already", way_out=way_out)
    _register()
    config, before = spec.text_config, spec.text_config._attn_implementation
    try:
        _set_implementation(config, NAME)
        for module, edit in zip(spec.attentions, edits, strict=True):
            _EDITS[module] = edit
        yield
    finally:
        for module in spec.attentions:
            _EDITS.pop(module, None)
        _set_implementation(config, before)


def _set_implementation(config: Any, name: str | None) -> None:
    # As a mapping it is set on this configuration alone: a flat one (Idefics) holds the vision tower's below it.
    config._attn_implementation = {"": name}


MAX_NEW_TOKENS = 20


class Wrapped(nn.Module):
    """What a wrapped model has besides its own class: `adapter`, `ask`, `unwrap`; and what it does otherwise."""

    adapter: Adapter
    processor: Any
    _block: ExitStack
    _modes: dict[nn.Module, bool]  # the backbone's modules, and the modes that they had

    def save_pretrained(self, save_directory: Path | str, *, is_main_process: bool = True, **_: Any) -> None:
        """Write the adapter alone, with the prompt that it goes with; `adapters.load` reads it."""
        if is_main_process:
            self.adapter.save_pretrained(save_directory)

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the adapter: the backbone is frozen, computes as in inference, and drops nothing.

        Transformers checkpoints what is in training mode, so that is said of such modules; see `_as_in_inference`.
        """
        super().train(mode)
        for module in self._modes:
            module.training = mode and (module is self or bool(getattr(module, "gradient_checkpointing", False)))
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as in inference, by transformers' own: in training, layers that are checkpointed see no cache."""
        generate: Any = getattr(super(), "generate")  # noqa: B009 - the model's own class has it
        training = self.training
        self.eval()
        try:
            return generate(*args, **kwargs)
        finally:
            self.train(training)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, *args: Any, **kw: Any
    ) -> None:
        """Keep layers' inputs alone for the backward pass, as transformers does it.

        Raises:
            InputError: with `use_reentrant`, which knows no gradient of what a layer is not handed.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            problem = "a reentrant checkpoint gives an adapter's parameters no gradient"
            raise InputError(problem, where="use_reentrant", way_out="Set it to False")
        enable: Any = getattr(super(), "activation_checkpointing_enable")  # noqa: B009 - the model's own class has it
        enable(activation_checkpointing_kwargs, *args, **kw)
        from transformers.modeling_layers import GradientCheckpointingLayer

        for layer in self._modes:
            if isinstance(layer, GradientCheckpointingLayer):
                layer._gradient_checkpointing_func = partial(
                    _as_in_inference, layer, layer._gradient_checkpointing_func
                )
        self.train(self.training)

    def unwrap(self) -> Any:
        """Take the adapter out and return the model as it was."""
        model: Any = self
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()
        block, modes, kind = self._block, self._modes, type(self).__mro__[2]
        del self.adapter, self._block, self._modes, self.processor  # before PEFT's layers give back what they replace
        block.close()
        self.__class__ = kind
        for module, mode in modes.items():
            module.training = mode
        return self

    def ask(self, image: Any, question: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """Return the answer to a question about a picture, by the prompt that the adapter was trained with.

        Args:
            image: what the processor takes (a PIL image); None where the prompt has none.
            question: where the prompt asks one.
            max_new_tokens: at most.

        Raises:
            InputError: the adapter has no prompt, or the model was wrapped without its processor.
        """
        template: Any = self.adapter.extra.get("template")
        if template is None or self.processor is None:
            missing = "processor" if self.processor is None else "prompt"
            raise InputError(f"there is no {missing} to ask with", where="ask", way_out=f"Give `wrap` the {missing}")
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):  # which would not be read as text
            if len(token.strip()) > 1:
                question = question and question.replace(token, f"{token[0]} {token[1:]}")
        text = template["text"].replace("{question}", (question or "").strip())
        pictures = {} if image is None else {"images": [[image]]}
        batch = {  # a tokenizer's own `to` takes no dtype
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in self.processor(text=[text], return_tensors="pt", **pictures).items()
        }
        written = self.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answer = tokenizer.decode(written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        ends = [place for stop in template["stop"] if (place := answer.find(stop)) >= 0]
        return answer[: min(ends, default=len(answer))].strip()


def _as_in_inference(layer: nn.Module, checkpointed: Any, forward: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint a layer of the frozen backbone, which drops nothing though its mode says that it trains."""

    def computed(*args: Any) -> Any:
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpointed(computed, *args)


def wrap(model: Any, adapter: Adapter, *, processor: Any = None, prompt: str | None = None) -> Any:
    """Put an adapter into a model for good, until `unwrap`; see `pipeline.adapters.wrap`."""
    if isinstance(model, Wrapped):
        raise InputError("the model is wrapped already", where="wrap", way_out="Call its unwrap() first")
    if prompt is not None:
        image = getattr(processor, "image_token", "")
        adapter.extra["template"] = {"text": prompt.replace("{image}", image), "stop": ["\n"]}
    kind = type(model)
    model._modes = {module: module.training for module in model.modules()}
    model.processor, model._block = processor, ExitStack()  # before PEFT adds what it takes away again
    try:
        model._block.enter_context(attach(model, adapter))
    except BaseException:
        del model.processor, model._block, model._modes
        raise
    model.__class__ = type(kind.__name__, (Wrapped, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    model.adapter = adapter
    if model.is_activation_checkpointing:  # perhaps a reentrant one
        model.activation_checkpointing_enable()
    return model.train(model.training)
