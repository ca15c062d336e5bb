"""What a slot is told of a trial: its configuration, and where things lie on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.load import BackboneSource
from pipeline.config.trial import Kind, TrialConfig


@dataclass(frozen=True)
class TrialRequest:
    """One trial for a slot.

    Attributes:
        config: what decides the numbers.
        folder: the trial's folder in the store, absolute.
        manifest: path of the task's manifest, absolute.
        source: where the backbone's weights lie.
        cache: folder of the visual-token cache, absolute; None: memory only.
        pack_key: trials with the same key can share one forward pass; None: this one trains alone.
        teacher_key: trials with the same key have the same teacher's pass; None: it has no teacher.
        kinds: of targets that the sweep's trials with the same teacher's pass are compared with.
        keep_seconds: the state is kept within an epoch after so long; 0: only at its end.
    """

    config: TrialConfig
    folder: str
    manifest: str
    source: BackboneSource
    cache: str | None = None
    pack_key: str | None = None
    teacher_key: str | None = None
    kinds: tuple[Kind, ...] = ()
    keep_seconds: float = 0.0

    @property
    def key(self) -> str:
        """The trial's key."""
        return self.config.key


class Requests:
    """A table of requests by trial key: what a plan knows, without the modules that made it."""

    def __init__(self, by_key: dict[str, TrialRequest]) -> None:
        self.by_key = by_key

    def __call__(self, tune_config: dict[str, Any]) -> TrialRequest:
        """Return the request of the trial that Tune calls `tune_config`."""
        return self.by_key[tune_config["trial"]]
