"""What a slot is told of a trial: its configuration, and where things lie on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import BackboneSource
from pipeline.trial import TrialConfig


@dataclass(frozen=True)
class TrialRequest:
    """One trial for a slot.

    Attributes:
        config: what decides the numbers.
        folder: the trial's folder in the store, absolute.
        manifest: path of the task's manifest, absolute.
        source: where the backbone's weights lie.
        cache: folder of the visual-token cache, absolute; None: memory only.
    """

    config: TrialConfig
    folder: str
    manifest: str
    source: BackboneSource
    cache: str | None = None

    @property
    def key(self) -> str:
        """The trial's key."""
        return self.config.key


Report = dict[str, Any]  # one epoch's metrics, with "epoch", "trial_key" and "done"; or {"error": ...}
