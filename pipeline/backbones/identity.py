"""The digest of a backbone's weights without loading them where that can be avoided."""

from __future__ import annotations

from pipeline.backbones import REGISTRY
from pipeline.backbones.load import load
from pipeline.backbones.weights import digest_of_folder, find_folder
from pipeline.config import BackboneSource


def digest_of(name: str, source: BackboneSource) -> str:
    """Return what `load(name, ...).digest` would be.

    Raises:
        InputError: unknown backbone, or weights that are missing.
    """
    if source.variant == "tiny":  # built from its configuration in a moment
        return load(name, variant="tiny", seed=source.seed).digest
    return digest_of_folder(find_folder(REGISTRY.get(name), source.weights, source.revision))
