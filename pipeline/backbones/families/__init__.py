"""How each transformers architecture is built, fed and read; and the backbones of them that are files in configs/."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.backbones.base import REGISTRY, Backbone, ChatMarkers, Family, RoleLines
from pipeline.backbones.families.idefics import Idefics2Family, IdeficsFamily
from pipeline.backbones.families.llava import LlavaFamily, LlavaNextFamily, LlavaOnevisionFamily
from pipeline.backbones.families.qwen3_vl import Qwen3VLFamily

_ALL = (IdeficsFamily, Idefics2Family, LlavaFamily, LlavaNextFamily, LlavaOnevisionFamily, Qwen3VLFamily)
FAMILIES: dict[str, Family] = {family.model_type: family() for family in _ALL}
CONFIGS = Path(__file__).parents[1] / "configs"  # the papers' six, the miniature's two


def read(name: str) -> Backbone:
    """Return the backbone of `configs/<name>.json`; its notes, `about` and `source`, are for readers of the file."""
    facts = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    for note in ("about", "source"):
        del facts[note]
    return Backbone(
        name=name,
        family=FAMILIES[facts.pop("family")],
        chat=TypeAdapter(ChatMarkers | None).validate_python(facts.pop("chat", None)),
        published_roles=TypeAdapter(RoleLines | None).validate_python(facts.pop("published_roles", None)),
        **facts,
    )


for _path in sorted(CONFIGS.glob("*.json")):
    REGISTRY.register(read(_path.stem))
