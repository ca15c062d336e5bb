"""Two methods at once: an adapter of attention, and LoRA on the weights (MimIC Table 12)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from pipeline.adapters.base import METHODS, Adapter, Init, ParameterGroup, Shown
from pipeline.adapters.hificl import HiFICL, HiFICLOptions
from pipeline.adapters.lora import LoRA, LoRAOptions
from pipeline.adapters.mimic import MimIC, MimICOptions
from pipeline.adapters.options import Facts, Options, PublishedDecoding
from pipeline.backbones.decoder import DecoderSpec


class MimICLoRAOptions(Options):
    """The options of both parts."""

    mimic: MimICOptions = MimICOptions()
    lora: LoRAOptions = LoRAOptions()

    def facts(self) -> Facts:
        """MimIC's training, LoRA's reach."""
        lora = self.lora.facts()
        return replace(self.mimic.facts(), trains_vision=lora.trains_vision, drops=lora.drops)


class HiFICLLoRAOptions(Options):
    """The options of both parts."""

    published_decoding: ClassVar[PublishedDecoding] = HiFICLOptions.published_decoding
    hificl: HiFICLOptions = HiFICLOptions()
    lora: LoRAOptions = LoRAOptions()

    def facts(self) -> Facts:
        """HiFICL's training, LoRA's reach."""
        lora = self.lora.facts()
        return replace(self.hificl.facts(), trains_vision=lora.trains_vision, drops=lora.drops)


class Combined(Adapter):
    """The parts side by side; LoRA's keep LoRA's learning rate, as a tenth of the trial's."""

    members: ClassVar[dict[str, type[Adapter]]] = {}

    def __init__(self, options: Options, spec: DecoderSpec, init: Init, parts: dict[str, Adapter]) -> None:
        super().__init__(options, spec, init)
        self.part = nn.ModuleDict(parts)

    @classmethod
    def build(cls, model: nn.Module, spec: DecoderSpec, options: Any, seed: int, device: torch.device) -> Combined:
        """Make every part for `model`."""
        parts = {
            name: member.build(model, spec, getattr(options, name), seed, device)
            for name, member in cls.members.items()
        }
        return cls(options, spec, Init(seed, device), parts)

    @property
    def parts(self) -> list[Adapter]:
        """The two adapters."""
        return list(self.part.values())  # type: ignore[arg-type]

    def start(self, shown: Shown) -> None:
        """Let every part start from the same demonstrations."""
        for part in self.parts:
            part.start(shown)

    def modules_trainable(self) -> dict[str, int]:
        """Return both parts' counts, prefixed by the part."""
        return {
            f"{name}.{key}": count
            for name, part in self.part.items()
            for key, count in part.modules_trainable().items()  # type: ignore[operator]
        }

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[ParameterGroup]:
        """Return both parts' groups; a part's rate keeps its own proportion to the first part's."""
        first = self.parts[0].facts.learning_rate
        groups: list[ParameterGroup] = []
        for part in self.parts:
            groups += part.parameter_groups(learning_rate * part.facts.learning_rate / first, weight_decay)
        return groups


@METHODS.register
class MimICLoRA(Combined):
    """MimIC and LoRA at once (MimIC Table 12)."""

    name = "mimic+lora"
    Options: ClassVar[type[Options]] = MimICLoRAOptions
    members: ClassVar[dict[str, type[Adapter]]] = {"mimic": MimIC, "lora": LoRA}


@METHODS.register
class HiFICLLoRA(Combined):
    """HiFICL and LoRA at once."""

    name = "hificl+lora"
    Options: ClassVar[type[Options]] = HiFICLLoRAOptions
    members: ClassVar[dict[str, type[Adapter]]] = {"hificl": HiFICL, "lora": LoRA}
