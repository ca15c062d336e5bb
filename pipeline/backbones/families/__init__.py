"""How each transformers architecture is built, fed and read; shared by the backbones of that architecture."""

from __future__ import annotations

from pipeline.backbones.base import Family
from pipeline.backbones.families.idefics import IdeficsFamily
from pipeline.backbones.families.idefics2 import Idefics2Family
from pipeline.backbones.families.llava import LlavaFamily, LlavaNextFamily, LlavaOnevisionFamily
from pipeline.backbones.families.qwen3_vl import Qwen3VLFamily

_ALL = (IdeficsFamily, Idefics2Family, LlavaFamily, LlavaNextFamily, LlavaOnevisionFamily, Qwen3VLFamily)
FAMILIES: dict[str, Family] = {family.model_type: family() for family in _ALL}
