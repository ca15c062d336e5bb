"""Pooled features of images, from the backbone's own vision tower, computed once beside the visual tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline.backbones.base import Pixels
from pipeline.resident.visual_tokens import DiskStore, VisualTokens

if TYPE_CHECKING:
    from pipeline.backbones.load import Loaded

_DISK_BYTES = 1 << 30


class ImageFeatures(VisualTokens):
    """One vector [D_v] an image: the vision tower's last hidden state, averaged over its positions.

    Looked up and kept as visual tokens are, in a store of its own.

    Args:
        loaded: the backbone.
        folder: of the store, shared by any number of processes; None: memory only.
    """

    def __init__(self, loaded: Loaded, folder: Path | None) -> None:
        super().__init__(loaded, disk_bytes=_DISK_BYTES)
        self.disk = None if folder is None else DiskStore(folder, _DISK_BYTES)
        self._tower: nn.Module = loaded.model.get_submodule(loaded.backbone.modules.vision)

    @override
    @torch.no_grad()
    def _encode(self, group: Sequence[tuple[str, Pixels]]) -> list[tuple[str, Tensor]]:
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(getattr(output, "last_hidden_state", output if isinstance(output, Tensor) else output[0]))

        handle = self._tower.register_forward_hook(keep)
        try:
            super()._encode(group)
        finally:
            handle.remove()
        # Pictures of a group have one shape, so each has the same share of the tower's rows (tiles, patches), in order.
        states = torch.cat([state.flatten(0, -2) for state in seen]).float()
        pooled = states.unflatten(0, (len(group), -1)).mean(1).cpu()
        return [(key, vector.clone()) for (key, _), vector in zip(group, pooled, strict=True)]


_HELD: WeakKeyDictionary[VisualTokens, ImageFeatures] = WeakKeyDictionary()


def beside(visual: VisualTokens) -> ImageFeatures:
    """Return the features that go with a backbone's visual tokens: one object a process, its store beside theirs."""
    if visual not in _HELD:
        folder = None
        if visual.disk is not None:
            name = hashlib.sha256(f"{visual.settings}:pooled".encode()).hexdigest()[:16]
            folder = visual.disk.folder.parent / name
        _HELD[visual] = ImageFeatures(visual.loaded, folder)
    return _HELD[visual]
