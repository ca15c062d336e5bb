"""Backbones as facts, one file each, or any of the hub by name; and the only way to load one.

```python
from pipeline import backbones
loaded = backbones.load("idefics2-8b-base", variant="tiny")
loaded = backbones.load("folder:weights/my-model")
```
"""

from __future__ import annotations

from typing import cast

from pipeline.backbones.base import Backbone
from pipeline.config.schema import BackboneSource
from pipeline.core.registry import Registry

REGISTRY: Registry[Backbone] = Registry("backbone", "pipeline.backbones", "hificl.backbones")
names = REGISTRY.names
register = REGISTRY.register


def get(name: str) -> Backbone:
    """Return a backbone by its file's name, by the name that params.yaml declares, or by `hub:...` and `folder:...`.

    Raises:
        InputError: no such backbone.
    """
    source = BackboneSource.spelled(name)
    return REGISTRY.get(name) if source is None else REGISTRY.made(name, source)


# Last: load.py needs the registry above, and this binds the function over the module of the same name.
from pipeline.backbones.families.generic import declared  # noqa: E402
from pipeline.backbones.load import Loaded, digest_of, load, load_from, of  # noqa: E402

REGISTRY.build = lambda name, source: declared(name, cast(BackboneSource, source))

__all__ = ["REGISTRY", "Backbone", "Loaded", "digest_of", "get", "load", "load_from", "names", "of", "register"]
