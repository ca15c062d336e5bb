"""FLOPs of a decoder's passes, an image's way to it, a training step and an answer by method: by formula.

The model may lie on the meta device.

One multiply and one add are two FLOPs; only matrix products count, as torch's FlopCounterMode does, and the score
matrix counts in full. With W the values of all layers' linear modules, T tokens fed, S tokens attended to, H d the
heads' width, L layers, V D the output embedding, A positions with logits:

    forward(T, S)   = 2 W T + 4 L H d T S + 2 V D A
    to activations  = 2 W T + 8 L H d T S + 2 V D A     no weight gradients: the backbone is frozen
    HiFICL, MimIC   + 12 L H d T n                      two products with n virtual tokens forward, four backward
    LoRA            + 6 T x its trainable values        forward, and backward to them and to activations

Below the lowest layer's attention nothing learns under HiFICL and MimIC, so that layer's q, k, v projections and its
attention have no backward.

An image, with P patches, W the values of the tower's linear modules and patch embedding, L layers of width D:

    tower      = 2 W P + 4 L D P^2
    projector  = 2 W P
    perceiver  = 2 W_projection P + per layer 2 (W_k + W_v) (P + N) + 2 (W_q + W_o + W_mlp) N + 4 H d N (P + N)
                 for N latents
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from pipeline import adapters
from pipeline.adapters.base import Adapter, AttentionAdapter, HiddenAdapter, WeightsAdapter, parts_of
from pipeline.backbones.base import Backbone, num_values
from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import InputError, nearest


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
        lowest = sum(linear_values(linear) for linear in (first.q_proj, first.k_proj, first.v_proj))
        head = num_values(model.get_output_embeddings().weight)  # type: ignore[operator]
        return cls(weights, lowest, spec.num_attentions, spec.num_heads * spec.head_dim, head, weights + head)

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
    """Return the values of all linear modules' weights inside `module`, itself included, however they are stored."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


TYPICAL_PICTURE = (480, 640)  # height and width of most COCO images


@dataclass(frozen=True)
class ImageCost:
    """One image: its patches, the tokens that it becomes, and the FLOPs of tower and connector.

    Attributes:
        patches: P.
        tokens: visual tokens.
        linear: FLOPs of the linear products, forward.
        scores: FLOPs of the products with score matrices, forward.
    """

    patches: int
    tokens: int
    linear: float
    scores: float

    @property
    def forward(self) -> float:
        """FLOPs of an image's forward pass."""
        return self.linear + self.scores

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass to activations, which a method that trains the tower needs."""
        return self.linear + 2.0 * self.scores


def image_cost(backbone: Backbone, model: Any, height: int | None = None, width: int | None = None) -> ImageCost:
    """Return what an image costs; nothing where the backbone is a text decoder.

    Args:
        backbone: the facts.
        model: its model, on any device.
        height: pixels that the tower is fed; None: of a typical picture, as the backbone's processor would have it.
        width: likewise.

    Raises:
        InputError: no formula for this architecture.
    """
    kind = backbone.family.model_type
    if not backbone.modules.vision and _is_dense(model):
        return ImageCost(0, 0, 0.0, 0.0)
    if kind not in _ARCHITECTURES:
        raise InputError(f"no cost formula for vision of type '{kind}'", way_out=nearest(kind, _ARCHITECTURES))
    sized, connect = _ARCHITECTURES[kind]
    if height is None or width is None:
        height, width = sized(backbone)
    settings = model.config.vision_config
    patches = (height // settings.patch_size) * (width // settings.patch_size)
    tower = model.get_submodule(backbone.modules.vision)
    convolution = sum(num_values(m.weight) for m in tower.modules() if isinstance(m, nn.Conv2d))
    linear = 2.0 * (linear_values(tower) + convolution) * patches
    scores = 4.0 * settings.num_hidden_layers * settings.hidden_size * patches * patches
    connector = [model.get_submodule(name) for name in backbone.modules.connector]
    tokens, more_linear, more_scores = connect(model, connector, patches)
    return ImageCost(patches, tokens, linear + more_linear, scores + more_scores)


def _is_dense(model: nn.Module) -> bool:
    """Whether every layer of a decoder attends, by projections of its own, and has no experts to choose from."""
    spec = decoder_of(model)
    whole = spec.num_attentions == spec.num_layers and all(hasattr(part, "q_proj") for part in spec.attentions)
    return whole and all(parameter.dim() <= 2 for parameter in spec.decoder.parameters())


def _native(backbone: Backbone) -> tuple[int, int]:
    """Pictures keep their size: the typical one lies within the processor's bounds."""
    del backbone
    return TYPICAL_PICTURE


def _square(backbone: Backbone) -> tuple[int, int]:
    size = backbone.processor["image_processor"]["size"]
    return size["height"], size["width"]


def _projector(model: Any, connector: list[nn.Module], patches: int) -> tuple[int, float, float]:
    del model
    return patches, 2.0 * sum(linear_values(part) for part in connector) * patches, 0.0


def _perceiver(model: Any, connector: list[nn.Module], patches: int) -> tuple[int, float, float]:
    settings = model.config.perceiver_config
    latents, heads = settings.resampler_n_latents, settings.resampler_n_heads * settings.resampler_head_dim
    (whole,) = connector
    resampler: Any = whole.get_submodule("perceiver_resampler")
    linear, scores = 2.0 * linear_values(whole.get_submodule("modality_projection")) * patches, 0.0
    for layer in resampler.layers:
        wide = num_values(layer.self_attn.k_proj.weight) + num_values(layer.self_attn.v_proj.weight)
        linear += 2.0 * wide * (patches + latents) + 2.0 * (linear_values(layer) - wide) * latents
        scores += 4.0 * heads * latents * (patches + latents)
    return latents, linear, scores


_Connect = Callable[[Any, list[nn.Module], int], tuple[int, float, float]]
_ARCHITECTURES: dict[str, tuple[Callable[[Backbone], tuple[int, int]], _Connect]] = {
    "idefics2": (_native, _perceiver),
    "llava": (_square, _projector),
}


@dataclass(frozen=True)
class Prompt:
    """How long prompts are.

    Attributes:
        text: tokens of one turn beside its image: question, markers, answer.
        answer: tokens of an answer.
        head: of `text`, those that stand once before a teacher's demonstrations, an instruction.
    """

    text: int = 26
    answer: int = 4
    head: int = 0


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one sample's step, by what they are spent on; an image's own pass is counted apart.

    Attributes:
        decoder: the student's forward and backward.
        adapter: the adapter's own products.
        vision: tower and connector inside the step, forward and backward: where the method trains them.
        teacher: the frozen decoder on demonstrations and query.
        image: one image's forward pass, which a frozen tower needs once per image and not once per step.
        images: images of a step, the teacher's included.
    """

    decoder: float
    adapter: float
    vision: float
    teacher: float
    image: float
    images: int

    @property
    def reused(self) -> float:
        """FLOPs of a step with visual tokens at hand."""
        return self.decoder + self.adapter + self.vision + self.teacher

    @property
    def whole(self) -> float:
        """FLOPs of a step that runs the vision tower for every image that it sees."""
        extra = 0.0 if self.vision else self.image
        return self.reused + extra + self.image * (self.images - 1)

    def as_dict(self) -> dict[str, float]:
        """Return all numbers, plain."""
        return {**asdict(self), "reused": self.reused, "whole": self.whole}


class Costs:
    """The formulas for one backbone.

    Args:
        backbone: the facts.
        model: its model, on any device (meta: `backbones.load(name, variant="meta")`).
        prompt: lengths.
        image_size: height and width that the tower is fed; None: a typical picture.
    """

    def __init__(
        self, backbone: Backbone, model: Any, prompt: Prompt | None = None, image_size: tuple[int, int] | None = None
    ) -> None:
        self.model, self.prompt = model, prompt or Prompt()
        self.decoder = DecoderCost.of(model)
        self.image: ImageCost = image_cost(backbone, model, *(image_size or (None, None)))
        self.vision_modules = (backbone.modules.vision, *backbone.modules.connector)

    @property
    def turn(self) -> int:
        """Tokens of one image and its text."""
        return self.image.tokens + self.prompt.text

    def floor(self) -> float:
        """Return the frozen decoder's forward, and backward to its input embeddings, for one sample."""
        return self.decoder.forward(self.turn) + self.decoder.backward(self.turn, to_inputs=True)

    def step(self, method: str, options: Mapping[str, Any] | None = None, *, shots: int = 8) -> StepCost:
        """Return what one sample's step costs.

        Raises:
            InputError: no such method or option.
        """
        adapter = adapters.create(method, self.model, **(options or {}))
        adapter.expect(self.turn * shots)
        return self.of(adapter, shots=shots)

    def of(self, adapter: Adapter, *, shots: int = 8) -> StepCost:
        """Return what one sample's step costs with an adapter that is there already."""
        trains_vision, teaches = adapter.facts.trains_vision, adapter.facts.teacher is not None
        tokens, logits = self.turn, self.prompt.answer
        weighs = any(True for _ in parts_of([adapter], WeightsAdapter))
        decoder = self.decoder.forward(tokens, logits=logits)
        decoder += self.decoder.backward(tokens, logits=logits, to_inputs=weighs)
        long = (tokens - self.prompt.head) * (shots + 1) + self.prompt.head
        return StepCost(
            decoder=decoder,
            adapter=self._adapter(adapter, tokens),
            vision=self.image.forward + (self.image.backward if self._in_tower(adapter) else 0.0)
            if trains_vision
            else 0.0,
            teacher=self.decoder.forward(long) if teaches else 0.0,
            image=self.image.forward,
            images=1 + shots + 1 if teaches else 1,
        )

    def start(self, adapter: Adapter, *, shots: int) -> float:
        """Return what is spent once before the first step: a pass over the demonstrations that a method starts from."""
        return self.decoder.forward(self.turn * shots) if adapter.facts.starts else 0.0

    def prefill(self, shots: int = 0) -> float:
        """Return a prompt's forward pass."""
        return self.decoder.forward(self.turn * (shots + 1), logits=1)

    def answer(self, shots: int = 0, new_tokens: int = 10) -> float:
        """Return a prompt's forward pass and the decoding behind it, with visual tokens at hand."""
        return self.prefill(shots) + self.decoder.decode(new_tokens - 1, self.turn * (shots + 1))

    def _in_tower(self, adapter: Adapter) -> bool:
        """Whether gradients go through the vision tower, and not only through what stands behind it."""
        tower = self.vision_modules[0]
        return any(
            name.startswith(tower)
            for _, part in parts_of([adapter], WeightsAdapter)
            for name in part.modules_trainable()
        )

    def _adapter(self, adapter: Adapter, tokens: int) -> float:
        flops = 0.0
        for _, part in parts_of([adapter], AttentionAdapter):
            flops += self.decoder.virtual(tokens, part.num_virtual)
            if part.routes:  # one product with the queries, forward and twice backward
                flops += self.decoder.virtual(tokens, part.num_virtual) / 2
            if part.prefills:  # the virtual tokens go through the decoder too
                flops += self.decoder.forward(part.num_virtual)
                flops += self.decoder.backward(part.num_virtual, to_inputs=True)
        for _, part in parts_of([adapter], WeightsAdapter):
            for module, values in part.modules_trainable().items():
                inside = module.startswith(self.vision_modules)
                flops += 6.0 * values * (self.image.patches if inside else tokens)
        for _, part in parts_of([adapter], HiddenAdapter):  # a bottleneck's matrices; a vector is added
            flops += 6.0 * tokens * sum(tensor.numel() for tensor in part.parameters() if tensor.dim() == 3)
        return flops
