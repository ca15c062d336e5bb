"""Backbones as facts, one file each, and the only way to load one.

```python
from pipeline import backbones
loaded = backbones.load("idefics2-8b-base", variant="tiny")
```
"""

from __future__ import annotations

from pipeline.backbones.base import Backbone
from pipeline.core.registry import Registry

REGISTRY: Registry[Backbone] = Registry("backbone", "pipeline.backbones", "hificl.backbones")
get = REGISTRY.get
names = REGISTRY.names
register = REGISTRY.register

# Last: load.py needs the registry above, and this binds the function over the module of the same name.
from pipeline.backbones.load import Loaded, digest_of, load  # noqa: E402

__all__ = ["REGISTRY", "Backbone", "Loaded", "digest_of", "get", "load", "names", "register"]
