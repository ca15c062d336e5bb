"""What is computed inside an attached model: virtual tokens and hidden-state shifts, each row of the batch its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.attention import virtual_attention
from pipeline.adapters.base import AttentionAdapter, HiddenAdapter
from pipeline.adapters.kernels import PreparedMask, prepare_mask
from pipeline.backbones.decoder import DecoderSpec
from pipeline.errors import InputError


class Rows:
    """Which of `count` adapters each row of the batch uses; None where there is only one."""

    def __init__(self, count: int) -> None:
        self.count, self.index = count, None
        self.widths: dict[int, int] = {}  # padded length that an adapter's own rows have without the others'
        self.images: tuple[int, ...] = ()  # how many each row has; () says one each
        self._placed: dict[tuple[int, torch.device], Tensor] = {}
        self._seeds: dict[int, int] = {}
        self._generators: dict[int, torch.Generator] = {}

    index: Tensor | None

    def set(self, rows: Tensor | Sequence[int] | None) -> None:
        """Take the rows of the next forward passes.

        Raises:
            InputError: a row names no adapter.
        """
        self._placed = {}
        if rows is None:
            self.index = None
            return
        index = torch.as_tensor(rows, dtype=torch.long)
        if index.dim() != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= self.count:
            raise InputError(f"rows must be adapter numbers from 0 to {self.count - 1}, one for each row of the batch")
        self.index = index

    def seed(self, seeds: Mapping[int, int]) -> None:
        """Start each adapter's stream of dropout masks anew."""
        self._seeds, self._generators = dict(seeds), {}

    def generator(self, index: int, device: torch.device) -> torch.Generator:
        """Return one adapter's stream of dropout masks."""
        if index not in self._generators:
            seed = self._seeds.get(index, torch.initial_seed())
            self._generators[index] = torch.Generator(device).manual_seed(seed)
        return self._generators[index]

    def of_images(self, count: int, device: torch.device) -> Tensor:
        """Return the adapter of each image of a batch of `count`.

        Raises:
            InputError: the vision tower sees another number: one that cuts images into tiles does not pack.
        """
        batch = len(self.images) or (0 if self.index is None else len(self.index))
        rows = self.of(batch, device)
        if rows is not None and self.images:
            rows = rows.repeat_interleave(torch.tensor(self.images, device=device))
        if rows is None or len(rows) != count:
            raise InputError(
                f"the vision tower sees {count} pictures and the rows have {0 if rows is None else len(rows)}",
                way_out="Train adapters of this backbone's vision tower alone (sweep.pack: 1)",
            )
        return rows

    def of(self, batch: int, device: torch.device) -> Tensor | None:
        """Return the rows of a batch of `batch`; in `generate`, a row's beams follow it.

        Raises:
            InputError: several adapters and no rows, or a batch of another size.
        """
        if self.index is None:
            if self.count > 1:
                raise InputError(
                    f"{self.count} adapters are attached and no row says which it uses",
                    way_out="Set pack.rows before the forward pass",
                )
            return None
        if self.count == 1:
            return None
        if batch % len(self.index):
            raise InputError(f"the batch has {batch} rows and pack.rows has {len(self.index)}")
        key = (batch, device)
        if key not in self._placed:
            repeated = self.index.to(device).repeat_interleave(batch // len(self.index))
            self._placed[key] = repeated
        return self._placed[key]


class AttentionEdit:
    """The virtual tokens of all layers and adapters, computed once per forward pass.

    Args:
        parts: adapters of attention by their number in the pack; rows of the others attend to the context alone.
        rows: which row uses which.
        spec: the decoder.
    """

    def __init__(self, parts: Mapping[int, AttentionAdapter], rows: Rows, spec: DecoderSpec) -> None:
        self.parts, self.rows, self.num_layers = dict(parts), rows, spec.num_layers
        self.shape = (spec.num_layers, spec.num_heads, spec.head_dim)
        self.layers: list[Callable[..., Tensor]] = [partial(self.attend, layer) for layer in range(spec.num_layers)]
        self._tokens: Any = None  # of every layer: name -> tensor
        self._mask: tuple[Tensor, torch.dtype, PreparedMask] | None = None
        kinds = {part.replaces for part in self.parts.values()}
        self._replaces: bool | list[bool] = (
            kinds.pop()
            if len(kinds) == 1
            else [index not in self.parts or self.parts[index].replaces for index in range(rows.count)]
        )

    def refresh(self, *, continues: bool = False) -> None:
        """Compute the virtual tokens from the parameters as they are now.

        Args:
            continues: this pass goes on behind a cache, without a gradient: the tokens of the passes before still hold.
        """
        self._mask = None
        if continues and self._tokens is not None:
            return
        made = {index: part() for index, part in self.parts.items()}
        stacked = made[0] if self.rows.count == 1 else _stack(made, self.rows.count, self.shape)
        # unbind once: its backward is one stack, where indexing layer by layer would write all layers each time
        layers = {name: value.unbind(0) for name, value in stacked.items()}
        self._tokens = [{name: values[i] for name, values in layers.items()} for i in range(self.num_layers)]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None, causal: bool
    ) -> Tensor:
        """Attend with one layer's virtual tokens, [B, H, T, d]."""
        if self._tokens is None:  # a layer called by itself
            self.refresh()
        rows = self.rows.of(q.shape[0], q.device)
        tokens = {name: value.to(q.device) for name, value in self._tokens[layer].items()}
        replaces: bool | Tensor
        if rows is not None:
            tokens = {name: value.index_select(0, rows) for name, value in tokens.items()}
            replaces = (
                self._replaces
                if isinstance(self._replaces, bool)
                else (torch.tensor(self._replaces, device=q.device)[rows])
            )
        else:
            replaces = self.parts[0].replaces
        bias, linear = tokens.get("bias"), tokens.get("linear")
        per_query = None
        if linear is not None:
            per_query = torch.einsum(
                "bhtd,hed->bhte" if linear.dim() == 3 else "bhtd,bhed->bhte", q.to(linear.dtype), linear
            )
        return virtual_attention(
            q,
            k,
            v,
            keys=tokens["keys"],
            bias=None if bias is None else bias.unsqueeze(-2),
            values=tokens["values"],
            per_query=per_query,
            mask=self._prepared(mask, q),
            scale=scale,
            replaces=replaces,
            causal=causal,
        )

    def _prepared(self, mask: Tensor | None, q: Tensor) -> PreparedMask | None:
        """Prepare a mask once for all layers: they are handed the same tensor."""
        if mask is None:
            return None
        if self._mask is None or self._mask[0] is not mask or self._mask[1] != q.dtype:
            self._mask = (mask, q.dtype, prepare_mask(mask, q.dtype))
        return self._mask[2]


def _stack(made: dict[int, dict[str, Tensor]], count: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Stack adapters with different numbers of virtual tokens, [L, count, H, n, ...]; missing tokens get bias -inf."""
    like = next(iter(made.values()))["keys"]
    widest = max(tokens["keys"].shape[2] for tokens in made.values())
    layers, heads, size = shape
    names = {name for tokens in made.values() for name in tokens if name == "linear"}
    ragged = len(made) < count or any("bias" in tokens or tokens["keys"].shape[2] < widest for tokens in made.values())
    out: dict[str, list[Tensor]] = {name: [] for name in ("keys", "values", *names, *(["bias"] if ragged else []))}
    for index in range(count):
        tokens = made.get(index, {})
        n = tokens["keys"].shape[2] if tokens else 0
        for name in ("keys", "values"):
            x = tokens.get(name, like.new_zeros(layers, heads, 0, size))
            out[name].append(torch.nn.functional.pad(x, (0, 0, 0, widest - n)))
        if ragged:
            x = tokens.get("bias", like.new_zeros(layers, heads, n))
            out["bias"].append(torch.nn.functional.pad(x, (0, widest - n), value=float("-inf")))
        for name in names:
            out[name].append(tokens.get(name, like.new_zeros(layers, heads, size, size)))
    return {name: torch.stack(values, 1) for name, values in out.items()}


class HiddenEdit:
    """Shift states of every layer and restore their norm: h <- (h + shift) |h| / |h + shift| (LIVE).

    Args:
        parts: adapters of hidden states by their number in the pack; rows of the others stay as they are.
        rows: which row uses which.
    """

    def __init__(self, parts: Mapping[int, HiddenAdapter], rows: Rows) -> None:
        self.parts, self.rows = dict(parts), rows
        self._shifts: Any = None

    def refresh(self) -> None:
        """Compute all layers' shifts from the parameters as they are now."""
        made = {index: part()["shift"] for index, part in self.parts.items()}
        if self.rows.count == 1:
            self._shifts = made[0].unbind(0)
            return
        like = next(iter(made.values()))
        stacked = torch.stack([made.get(i, torch.zeros_like(like)) for i in range(self.rows.count)], 1)
        self._shifts = stacked.unbind(0)

    def before(self, module: Any, args: Any) -> None:
        """Refresh, as the decoder's forward pre-hook."""
        self.refresh()

    def hook(self, layer: int) -> Callable[..., Any]:
        """Return the forward hook of the module that gives one layer's states."""

        def edit(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.shifted(layer, output[0]), *output[1:])
            return self.shifted(layer, output)

        return edit

    def shifted(self, layer: int, h: Tensor) -> Tensor:
        """Return the edited hidden state [B, T, D], in the dtype of `h`."""
        if self._shifts is None:
            self.refresh()
        shift = self._shifts[layer].to(h.device)
        rows = self.rows.of(h.shape[0], h.device)
        shift = shift if rows is None else shift.index_select(0, rows).unsqueeze(1)
        wide = h.to(torch.promote_types(h.dtype, shift.dtype))
        moved = wide + shift
        norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (wide, moved)]
        out = (moved * (norms[0] / norms[1].clamp_min(torch.finfo(wide.dtype).tiny))).to(h.dtype)
        if rows is None or len(self.parts) == self.rows.count:
            return out
        edits = torch.tensor([i in self.parts for i in range(self.rows.count)], device=h.device)[rows]
        return torch.where(edits.view(-1, 1, 1), out, h)
