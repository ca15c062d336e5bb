"""FLOPs of a decoder's passes, by formula, from a model that may lie on the meta device.

One multiply and one add are two FLOPs; only matrix products count, as torch's FlopCounterMode does, and the score
matrix counts in full. With W the values of all layers' linear modules, T tokens fed, S tokens attended to, H d the
heads' width, L layers, V D the output embedding, A positions with logits:

    forward(T, S)   = 2 W T + 4 L H d T S + 2 V D A
    to activations  = 2 W T + 8 L H d T S + 2 V D A     no weight gradients: the backbone is frozen
    HiFICL, MimIC   + 12 L H d T n                      two products with n virtual tokens forward, four backward
    LoRA            + 6 T x its trainable values        forward, and backward to them and to activations

Below the lowest layer's attention nothing learns under HiFICL and MimIC, so that layer's q, k, v projections and its
attention have no backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.backbones.decoder import decoder_of


@dataclass(frozen=True)
class DecoderCost:
    """The sizes that the formulas at the top of this file need.

    Attributes:
        weights: W, of all layers.
        lowest: values of the lowest layer's q, k and v projections.
        layers: L.
        width: H d.
        head: V D.
        total: values of all parameters of the decoder and its output embedding, which a decoded token reads.
    """

    weights: int
    lowest: int
    layers: int
    width: int
    head: int
    total: int

    @classmethod
    def of(cls, model: nn.Module) -> DecoderCost:
        """Read the sizes off a model."""
        spec = decoder_of(model)
        weights = sum(linear_values(layer) for layer in spec.layers)
        first: Any = spec.attentions[0]
        lowest = sum(linear.weight.numel() for linear in (first.q_proj, first.k_proj, first.v_proj))
        head = model.get_output_embeddings().weight.numel()  # type: ignore[operator]
        return cls(weights, lowest, spec.num_layers, spec.num_heads * spec.head_dim, head, weights + head)

    def forward(self, tokens: int, *, seen: int | None = None, logits: int = 0) -> float:
        """Return one row's forward pass.

        Args:
            tokens: T.
            seen: S; None: T.
            logits: A.
        """
        seen = tokens if seen is None else seen
        return 2.0 * self.weights * tokens + 4.0 * self.layers * self.width * tokens * seen + 2.0 * self.head * logits

    def backward(self, tokens: int, *, logits: int = 0, to_inputs: bool = False) -> float:
        """Return one row's backward pass to activations.

        Args:
            tokens: T.
            logits: A.
            to_inputs: on to the input embeddings (the floor, LoRA); else the lowest layer's attention is left out.
        """
        layers = self.layers if to_inputs else self.layers - 1
        weights = self.weights if to_inputs else self.weights - self.lowest
        return 2.0 * weights * tokens + 8.0 * layers * self.width * tokens * tokens + 2.0 * self.head * logits

    def virtual(self, tokens: int, number: int) -> float:
        """Return what `number` virtual tokens add to one row's forward and backward."""
        return 12.0 * self.layers * self.width * tokens * number

    def decode(self, steps: int, prompt: int) -> float:
        """Return one row's decoding of `steps` tokens behind a cached prompt."""
        mean_seen = prompt + (steps + 1) / 2
        return steps * (2.0 * (self.weights + self.head) + 4.0 * self.layers * self.width * mean_seen)


def linear_values(module: nn.Module) -> int:
    """Return the values of all linear modules' weights inside `module`, itself included."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
