"""What is computed inside an attached model, each row its own: virtual tokens, shifts, low-rank updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.adapters.base import AttentionAdapter, HiddenAdapter, Prefill
from pipeline.adapters.pack import Pack, joined
from pipeline.attention.kernels import PreparedMask, prepare_mask
from pipeline.attention.softmax import no_autocast, product
from pipeline.attention.virtual import virtual_attention
from pipeline.backbones.decoder import DecoderSpec, check_hooks, eager
from pipeline.core.errors import InputError


class AttentionEdit:
    """The virtual tokens of all layers and adapters, computed once per forward pass.

    Args:
        parts: adapters of attention by their number in the pack; rows of the others attend to the context alone.
        pack: knows which row uses which.
        spec: the decoder.
        prefill: runs states through it as it is.
    """

    def __init__(self, parts: Mapping[int, AttentionAdapter], pack: Pack, spec: DecoderSpec, prefill: Prefill) -> None:
        self.parts, self.pack, self.num_layers, self.prefill = dict(parts), pack, spec.num_attentions, prefill
        self.shape = (spec.num_attentions, spec.num_heads, spec.head_dim)
        self.layers: list[Callable[..., Tensor]] = [partial(self.attend, layer) for layer in range(spec.num_attentions)]
        self._tokens: Any = None  # of every layer: name -> tensor
        self._mask: tuple[Tensor, torch.dtype, PreparedMask] | None = None
        kinds = {part.replaces for part in self.parts.values()}
        self._replaces: bool | list[bool] = (
            kinds.pop()
            if len(kinds) == 1
            else [index not in self.parts or self.parts[index].replaces for index in range(len(pack.adapters))]
        )

    def refresh(self, *, continues: bool = False) -> None:
        """Compute the virtual tokens from the parameters as they are now.

        Args:
            continues: this pass goes on behind a cache, without a gradient: the tokens of the passes before still hold.
        """
        self._mask = None
        if continues and self._tokens is not None:
            return
        self._tokens = self.pack.once("attention", self._made)

    def _made(self) -> list[dict[str, Tensor]]:
        made = {index: part(self.prefill) if part.prefills else part() for index, part in self.parts.items()}
        stacked = made[0] if len(self.pack.adapters) == 1 else _stack(made, len(self.pack.adapters), self.shape)
        # unbind once: its backward is one stack, where indexing layer by layer would write all layers each time
        layers = {name: value.unbind(0) for name, value in stacked.items()}
        return [{name: values[i] for name, values in layers.items()} for i in range(self.num_layers)]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None, causal: bool
    ) -> Tensor:
        """Attend with one layer's virtual tokens, [B, H, T, d].

        With a `router` token i has the logit log g_i(q) besides, g = softmax_i(router_i . q) over its adapter's tokens.
        """
        if self._tokens is None:  # a layer called by itself
            self.refresh()
        rows = self.pack.of_rows(q.shape[0], q.device)
        tokens = {name: value.to(q.device) for name, value in self._tokens[layer].items()}
        replaces: bool | Tensor
        if rows is not None:
            tokens = {name: self.pack.of_each_row((layer, name), value, rows) for name, value in tokens.items()}
            flags = self._replaces
            replaces = flags if isinstance(flags, bool) else self.pack.flagged(flags, q.shape[0], q.device)
        else:
            replaces = self.parts[0].replaces
        bias, linear, per_query = tokens.get("bias"), tokens.get("linear"), None
        if bias is not None:
            bias = bias.unsqueeze(-2)
            if "router" in tokens:
                routed = _routed(q, tokens["router"], bias)
                bias = routed if rows is None else torch.where(self._routes(q).view(-1, 1, 1, 1), routed, bias)
        if linear is not None:
            per_query = torch.einsum(
                "bhtd,hed->bhte" if linear.dim() == 3 else "bhtd,bhed->bhte", q.to(linear.dtype), linear
            )
        if self.pack.without is not None:
            absent = torch.where(self.pack.without[layer].to(q.device), float("-inf"), 0.0)
            bias = absent if bias is None else bias + absent
        attended = partial(
            virtual_attention, q, k, keys=tokens["keys"], bias=bias, mask=self._prepared(mask, q), scale=scale,
            causal=causal,
        )  # fmt: skip
        if self.pack.watch is not None:
            self.pack.watch(layer, _virtual_weights(attended, tokens["keys"], v))
        return attended(v, values=tokens["values"], per_query=per_query, replaces=replaces)

    def _routes(self, q: Tensor) -> Tensor:
        """Return whose adapter has a router, [B]."""
        routes = [i in self.parts and self.parts[i].routes for i in range(len(self.pack.adapters))]
        return self.pack.flagged(routes, q.shape[0], q.device)

    def _prepared(self, mask: Tensor | None, q: Tensor) -> PreparedMask | None:
        """Prepare a mask once for all layers: they are handed the same tensor."""
        if mask is None:
            return None
        if self._mask is None or self._mask[0] is not mask or self._mask[1] != q.dtype:
            self._mask = (mask, q.dtype, prepare_mask(mask, q.dtype))
        return self._mask[2]


def _virtual_weights(attended: Callable[..., Tensor], keys: Tensor, v: Tensor) -> Tensor:
    """Return the attention that each virtual token gets, [B, H, T, n]: what comes out where token i's value is e_i.

    Args:
        attended: `virtual_attention` of the context's values, given the virtual ones.
        keys: of the virtual tokens, [H, n, d] or [B, H, n, d].
        v: the context's values, which count for nothing here.
    """
    n, size = keys.shape[-2:]
    basis, parts = torch.eye(n, device=v.device, dtype=v.dtype), []
    for start in range(0, n, size):  # a value has as many places as a head is wide
        values = basis[:, start : start + size]
        width = values.shape[1]
        values = torch.nn.functional.pad(values, (0, size - width)).expand(*keys.shape[:-1], size)
        parts.append(attended(torch.zeros_like(v), values=values)[..., :width])
    return torch.cat(parts, -1)


def _routed(q: Tensor, router: Tensor, bias: Tensor) -> Tensor:
    """Return what a router adds to the logits of virtual tokens, with what they have besides, [B, H, T, n].

    Args:
        q: queries, [B, H, T, d].
        router: [H, n, d] or [B, H, n, d].
        bias: [H, 1, n] or [B, H, 1, n]; -inf where an adapter has no such token.
    """
    with no_autocast(q):
        scores = product(q.to(router.dtype), router)
    hidden = bias == float("-inf")
    total = scores.masked_fill(hidden & ~hidden.all(-1, keepdim=True), float("-inf")).logsumexp(-1, keepdim=True)
    return scores - total + bias


def _stack(made: dict[int, dict[str, Tensor]], count: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Stack adapters with different numbers of virtual tokens, [L, count, H, n, ...]; missing tokens get bias -inf."""
    like = next(iter(made.values()))["keys"]
    widest = max(tokens["keys"].shape[2] for tokens in made.values())
    layers, heads, size = shape
    names = {name for tokens in made.values() for name in tokens if name == "linear"}
    routes = any("router" in tokens for tokens in made.values())
    ragged = (
        routes
        or len(made) < count
        or any("bias" in tokens or tokens["keys"].shape[2] < widest for tokens in made.values())
    )
    by_token = ("keys", "values", "router") if routes else ("keys", "values")
    out: dict[str, list[Tensor]] = {name: [] for name in (*by_token, *names, *(["bias"] if ragged else []))}
    for index in range(count):
        tokens = made.get(index, {})
        n = tokens["keys"].shape[2] if tokens else 0
        for name in by_token:
            x = tokens.get(name, like.new_zeros(layers, heads, n, size))
            out[name].append(torch.nn.functional.pad(x, (0, 0, 0, widest - n)))
        if ragged:
            x = tokens.get("bias", like.new_zeros(layers, heads, n))
            out["bias"].append(torch.nn.functional.pad(x, (0, widest - n), value=float("-inf")))
        for name in names:
            out[name].append(tokens.get(name, like.new_zeros(layers, heads, size, size)))
    return {name: torch.stack(values, 1) for name, values in out.items()}


class HiddenEdit:
    """Edit a state of every layer, each row by its own adapter (`HiddenAdapter.edited`).

    Args:
        parts: adapters that edit it in one way, by their number in the pack; rows of the others stay as they are.
        pack: knows which row uses which.
        modules: give the states, layer by layer.
    """

    def __init__(self, parts: Mapping[int, HiddenAdapter], pack: Pack, modules: Sequence[nn.Module]) -> None:
        self.parts, self.pack = dict(parts), pack
        self.layer_of = {module: layer for layer, module in enumerate(modules)}
        self.edited = next(iter(self.parts.values())).edited
        self._tensors: dict[str, tuple[Tensor, ...]] | None = None
        alone = self.parts if pack.apart else {}
        self.apart = {i: HiddenEdit({0: part}, Pack(pack.adapters[i]), modules) for i, part in alone.items()}

    def refresh(self) -> None:
        """Compute all layers' tensors from the parameters as they are now."""
        for edit in self.apart.values():
            edit.refresh()
        if self.apart:
            return
        self._tensors = self.pack.once(("hidden", self.edited, *self.layer_of), self._made)

    def _made(self) -> dict[str, tuple[Tensor, ...]]:
        made = {index: part() for index, part in self.parts.items()}
        if len(self.pack.adapters) == 1:
            return {name: values.unbind(0) for name, values in made[0].items()}
        tensors_of: dict[str, tuple[Tensor, ...]] = {}
        for name, like in next(iter(made.values())).items():
            each = {index: tensors[name] for index, tensors in made.items()}
            shape = [max(sizes) for sizes in zip(*(value.shape for value in each.values()), strict=True)]
            rows = [
                _padded(each[i], shape) if i in each else like.new_zeros(shape) for i in range(len(self.pack.adapters))
            ]
            tensors_of[name] = torch.stack(rows, 1).unbind(0)
        return tensors_of

    def before(self, module: Any, args: Any) -> None:
        """Refresh, as the decoder's forward pre-hook."""
        self.refresh()

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Edit the states that a module gives, as its forward hook: one for all layers, so that none has another's."""
        layer = self.layer_of[module]
        if isinstance(output, tuple):
            return (self.of_layer(layer, output[0]), *output[1:])
        return self.of_layer(layer, output)

    def of_layer(self, layer: int, h: Tensor) -> Tensor:
        """Return the edited state [B, T, D], in the dtype of `h`."""
        if self.apart:
            parts = self.pack.split(h, tokens=1)
            return joined([self.apart[i].of_layer(layer, x) if i in self.apart else x for i, x in parts], h.shape[1])
        if self._tensors is None:
            self.refresh()
        given = {name: values[layer].to(h.device) for name, values in (self._tensors or {}).items()}
        rows = self.pack.of_rows(h.shape[0], h.device)
        if rows is not None:
            given = {name: value.index_select(0, rows) for name, value in given.items()}
            given = {name: value.unsqueeze(1) if value.dim() == 2 else value for name, value in given.items()}
        wide = torch.promote_types(h.dtype, next(iter(given.values())).dtype)

        def edited(h: Tensor, *values: Tensor) -> Tensor:
            return self.edited(h.to(wide), **dict(zip(given, values, strict=True))).to(h.dtype)

        if h.dtype != wide and torch.is_grad_enabled():  # several copies in fp32, made again when needed
            out = checkpoint(edited, h, *given.values(), use_reentrant=False, preserve_rng_state=False)
        else:
            out = edited(h, *given.values())
        if rows is None or len(self.parts) == len(self.pack.adapters):
            return out
        edits = self.pack.flagged([i in self.parts for i in range(len(self.pack.adapters))], h.shape[0], h.device)
        return torch.where(edits.view(-1, 1, 1), out, h)


def _padded(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad a tensor with zeros behind its values to a shape."""
    missing = [
        by for size, given in zip(reversed(shape), reversed(value.shape), strict=True) for by in (0, size - given)
    ]
    return torch.nn.functional.pad(value, missing)


class WeightsEdit:
    """y_b = W x_b + s_k B_k A_k dropout(x_b) with k = rows[b], for every module that an adapter updates.

    What PEFT computes for one adapter, in one batched product for all; ranks are padded with zeros to the largest.

    Args:
        parts: adapters of weights by their number in the pack; rows of the others stay as they are.
        pack: knows which row uses which, and each adapter's stream of dropout masks.
        spec: the decoder; modules outside it see one row an image.
    """

    def __init__(self, parts: Mapping[int, Any], pack: Pack, spec: DecoderSpec) -> None:
        self.parts, self.pack = dict(parts), pack
        self.inside = {id(module) for layer in spec.layers for module in layer.modules()}

    @property
    def modules(self) -> list[str]:
        """Names of the modules that some adapter updates, in the order of the first."""
        return list(dict.fromkeys(name for part in self.parts.values() for name in part.module_names()))

    def update(self, name: str, linear: nn.Linear, x: Tensor) -> Tensor:
        """Return what is added to the module's output, [N, T, out], for inputs [N, T, in]."""
        if x.dim() != 3:
            raise InputError(f"{name} is fed {x.dim()}-dimensional inputs, whose rows are not known")
        inside = id(linear) in self.inside
        if self.pack.apart:
            parts = self.pack.split(self._dropped(x, inside), tokens=1 if inside else None)
            return joined([self._of_part(number, name, linear, part) for number, part in parts], x.shape[1])
        rows = self.pack.of_rows(x.shape[0], x.device) if inside else self.pack.of_images(x.shape[0], x.device)
        if rows is None:
            raise InputError("a single adapter is PEFT's to compute", way_out="Use `LoRA.injected`")
        a, b = self.pack.once(("weights", name), lambda: self._of(name, linear))
        x = self._dropped(x, inside)
        low = torch.einsum("ntd,nrd->ntr", x.to(a.dtype), a.index_select(0, rows))
        return torch.einsum("ntr,nor->nto", low, b.index_select(0, rows))

    def _of_part(self, number: int, name: str, linear: nn.Linear, x: Tensor) -> Tensor:
        """Return what one adapter's update adds, by the products of PEFT's own layer."""
        part = self.parts.get(number)
        if part is None or name not in part.module_names():
            return x.new_zeros(*x.shape[:2], linear.out_features)
        a, b = (matrix.to(x.device) for matrix in part.matrices(name))
        return nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b) * part.scaling

    def _of(self, name: str, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return all adapters' A [K, r, in] and s B [K, out, r] of one module."""
        widest = max(part.options.rank for part in self.parts.values())
        device = linear.weight.device
        a, b = [], []
        for index in range(len(self.pack.adapters)):
            part = self.parts.get(index)
            if part is None or name not in part.module_names():
                a.append(torch.zeros(widest, linear.in_features, device=device))
                b.append(torch.zeros(linear.out_features, widest, device=device))
                continue
            part_a, part_b = part.matrices(name)
            missing = widest - len(part_a)
            a.append(nn.functional.pad(part_a.to(device), (0, 0, 0, missing)))
            b.append(nn.functional.pad(part_b.to(device) * part.scaling, (0, missing)))
        return torch.stack(a), torch.stack(b)

    def _dropped(self, x: Tensor, inside: bool) -> Tensor:
        """Drop inputs by each adapter's own stream, of the shape that it has alone, so that a pack changes nothing."""
        dropping = {i: part.options.dropout for i, part in self.parts.items() if part.training and part.options.dropout}
        if not dropping:
            return x
        mask = torch.ones_like(x)
        for index, p in dropping.items():
            places = self.pack.places_of(index, x.shape[0], x.device, images=not inside)
            if len(places):
                width = self.pack.width_of(index, x.shape[1]) if inside else x.shape[1]
                drawn = torch.empty(len(places), width, x.shape[2], dtype=x.dtype, device=x.device)
                drawn.bernoulli_(1 - p, generator=self.pack.generator(index, x.device))
                mask[places, :width] = drawn / (1 - p)
        return x * mask


@contextmanager
def edited_weights(model: nn.Module, edit: WeightsEdit) -> Iterator[None]:
    """Add the updates to the model's linear modules for the length of the block."""
    modules = {model.get_submodule(name): name for name in edit.modules}
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + edit.update(modules[module], module, args[0]).to(output.dtype)

    check_hooks(model.modules(), modules)
    hook = eager(add)
    try:
        for module, name in modules.items():
            if not isinstance(module, nn.Linear):
                raise InputError(f"the model has no plain linear module {name}", way_out="Attach LoRA once")
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
