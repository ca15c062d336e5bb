"""How many parameters a method trains on a real configuration; no weights, no memory."""

from __future__ import annotations

from typing import Any

from pipeline import adapters, backbones
from pipeline.errors import InputError
from pipeline.plain_yaml import read


def count(backbone: str, method: str, settings: list[str]) -> dict[str, Any]:
    """Return `{"trainable": int, "modules": {...}}` of a method on a backbone's real configuration.

    Args:
        backbone: a registered backbone.
        method: a method that trains.
        settings: its options as `key=value`.

    Raises:
        InputError: unknown backbone, method or option.
    """
    options = {}
    for item in settings:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"'{item}' is not of the form key=value", where="--set", way_out="Write --set rank=8")
        options[key] = read(text, f"--set {key}")
    checked = adapters.check_options(method, options)
    model = backbones.load(backbone, variant="meta").model
    adapter = adapters.create(method, model, **checked)
    return {"backbone": backbone, "method": method, "options": checked, "trainable": adapter.num_trainable(),
            "modules": adapter.modules_trainable()}  # fmt: skip
