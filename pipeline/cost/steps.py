"""FLOPs of one sample's training step and of one answer, by method, from a backbone's real configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import adapters
from pipeline.adapters.base import Adapter, AttentionAdapter, WeightsAdapter, parts_of
from pipeline.backbones.base import Backbone
from pipeline.cost.flops import DecoderCost, ImageCost, image_cost


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
        return self.of(adapters.create(method, self.model, **(options or {})), shots=shots)

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
            vision=self.image.forward + self.image.backward if trains_vision else 0.0,
            teacher=self.decoder.forward(long) if teaches else 0.0,
            image=self.image.forward,
            images=1 + shots + 1 if teaches else 1,
        )

    def prefill(self, shots: int = 0) -> float:
        """Return a prompt's forward pass."""
        return self.decoder.forward(self.turn * (shots + 1), logits=1)

    def answer(self, shots: int = 0, new_tokens: int = 10) -> float:
        """Return a prompt's forward pass and the decoding behind it, with visual tokens at hand."""
        return self.prefill(shots) + self.decoder.decode(new_tokens - 1, self.turn * (shots + 1))

    def _adapter(self, adapter: Adapter, tokens: int) -> float:
        flops = 0.0
        for _, part in parts_of([adapter], AttentionAdapter):
            flops += self.decoder.virtual(tokens, part()["keys"].shape[2])
        for _, part in parts_of([adapter], WeightsAdapter):
            for module, values in part.modules_trainable().items():
                inside = module.startswith(self.vision_modules)
                flops += 6.0 * values * (self.image.patches if inside else tokens)
        return flops
