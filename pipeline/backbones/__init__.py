"""Backbones as facts, one file each, or any of the hub by name; and the only way to load one.

```python
from pipeline import backbones
loaded = backbones.load("idefics2-8b-base", variant="tiny")
loaded = backbones.load("folder:weights/my-model")
```
"""

from __future__ import annotations

from pipeline.backbones.base import REGISTRY, Backbone, get
from pipeline.backbones.load import Loaded, digest_of, load, load_from, of, reads_images

names = REGISTRY.names
register = REGISTRY.register

__all__ = [
    "REGISTRY",
    "Backbone",
    "Loaded",
    "digest_of",
    "get",
    "load",
    "load_from",
    "names",
    "of",
    "reads_images",
    "register",
]
