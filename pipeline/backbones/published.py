"""The papers' six backbones, the miniature's two: each a file in configs/ with its facts and where they were seen."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.backbones.base import REGISTRY, Backbone, ChatMarkers, RoleLines
from pipeline.backbones.families import FAMILIES

CONFIGS = Path(__file__).with_name("configs")


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
