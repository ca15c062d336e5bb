"""Low-rank updates of several adapters in one batch: every row is multiplied with its own A and B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.pack import Pack
from pipeline.backbones.decoder import DecoderSpec
from pipeline.core.errors import InputError


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
        rows = self.pack.of_rows(x.shape[0], x.device) if inside else self.pack.of_images(x.shape[0], x.device)
        if rows is None:
            raise InputError("a single adapter is PEFT's to compute", way_out="Use `LoRA.injected`")
        a, b = self._of(name, linear)
        x = self._dropped(x, rows, inside)
        low = torch.einsum("ntd,nrd->ntr", x.to(a.dtype), a.index_select(0, rows))
        return torch.einsum("ntr,nor->nto", low, b.index_select(0, rows))

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

    def _dropped(self, x: Tensor, rows: Tensor, inside: bool) -> Tensor:
        """Drop inputs by each adapter's own stream, of the shape that it has alone, so that a pack changes nothing."""
        dropping = {i: part.options.dropout for i, part in self.parts.items() if part.training and part.options.dropout}
        if not dropping:
            return x
        mask = torch.ones_like(x)
        for index, p in dropping.items():
            places = (rows == index).nonzero()[:, 0]
            if len(places):
                width = self.pack.width_of(index, x.shape[1]) if inside else x.shape[1]
                drawn = torch.empty(len(places), width, x.shape[2], dtype=x.dtype, device=x.device)
                drawn.bernoulli_(1 - p, generator=self.pack.generator(index, x.device))
                mask[places, :width] = drawn / (1 - p)
        return x * mask


@contextmanager
def edited_weights(model: nn.Module, edit: WeightsEdit) -> Iterator[None]:
    """Add the updates to the model's linear modules for the length of the block."""
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def hook(name: str) -> Any:
        def add(module: Any, args: Any, output: Tensor) -> Tensor:
            return output + edit.update(name, module, args[0]).to(output.dtype)

        return add

    try:
        for name in edit.modules:
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise InputError(f"the model has no plain linear module {name}", way_out="Attach LoRA once")
            handles.append(module.register_forward_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
