"""In which order trials are started: those that share a teacher's pass follow one another on one slot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

from pipeline.sweep.plan import Plan, teacher_key


def in_lanes(plan: Plan, keys: Sequence[str], slots: int) -> list[str]:
    """Return `keys` as `slots` lanes taken in turn, a teacher's trials in one lane, one backbone after another.

    A slot computes a teacher's targets once and keeps them for the trials behind it (`Resident.targets`); two slots
    that took turns on one teacher would each compute them. The longest groups are placed first, each in the shortest
    lane.
    """
    by_backbone: dict[str, dict[str, list[str]]] = {}
    for key in keys:
        config = plan.trials[key]
        by_backbone.setdefault(config.backbone, {}).setdefault(teacher_key(config) or key, []).append(key)
    ordered: list[str] = []
    for groups in by_backbone.values():
        lanes: list[list[str]] = [[] for _ in range(slots)]
        for group in sorted(groups.values(), key=len, reverse=True):
            min(lanes, key=len).extend(group)
        ordered += [key for key in chain(*zip_longest(*lanes)) if key is not None]
    return ordered
