"""The frozen parts of a decoder under `torch.compile` (`train.compile`): norms and feed-forward nets.

Nothing is edited inside them, so one compilation serves all adapters and packs. Attention stays as it is: it holds what
is attached, and a new adapter would have it compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.backbones.decoder import decoder_of

Forwards = dict[nn.Module, Callable[..., Any]]


@contextmanager
def compiled_parts(model: nn.Module, forwards: Forwards) -> Iterator[None]:
    """Let the decoder's norms and feed-forward nets run compiled inside the block; on leaving, all is as it was.

    What is compiled is compiled at its first call, for any length and number of rows.

    Args:
        model: a transformers model.
        forwards: of earlier blocks, reused and added to.
    """
    spec = decoder_of(model)
    attentions = set(spec.attentions)
    parts = [part for layer in spec.layers for part in layer.children() if part not in attentions]
    for part in parts:
        if part not in forwards:
            forwards[part] = torch.compile(part.forward, dynamic=True)
        part.forward = forwards[part]
    try:
        yield
    finally:
        for part in parts:
            del part.forward
