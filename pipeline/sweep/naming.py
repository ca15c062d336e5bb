"""What runs are called and what stands on a study's page in MLflow."""

from __future__ import annotations

from typing import Any

from pipeline.config import Params
from pipeline.sweep.space import Cell
from pipeline.trial import TrialConfig


def run_name(cell: Cell, config: TrialConfig, *, with_backbone: bool) -> str:
    """Return a trial's name: its row, its task, what varies and what is searched, seed, and the key's beginning.

    Args:
        cell: the cell that asked for the trial first.
        config: the trial.
        with_backbone: whether trials of several backbones stand beside each other.
    """
    parts = parts_of(cell, config)
    del parts["study"]
    if not with_backbone:
        del parts["backbone"]
    return " ".join([*parts.values(), config.key[:6]])


def parts_of(cell: Cell, config: TrialConfig) -> dict[str, str]:
    """Return what a trial is told apart by, kind by kind: its row, its task, ..., what varies and is searched, seed."""
    values = {**config.model_dump(mode="json"), **config.options}
    points = {**cell.vary, **{name: values[name] for name in cell.search if name in values}}
    return {
        "row": cell.row, "task": cell.task, "backbone": cell.backbone, "study": cell.study,
        **{name: f"{name}={_short(value)}" for name, value in points.items()}, "seed": f"seed={config.seed}",
    }  # fmt: skip


def description(params: Params, study: str, num_trials: int) -> str:
    """Return what a study's parent run says of itself, in Markdown."""
    definition = params.studies[study]
    lines = [f"**{definition.title}**"]
    lines.append(f"{num_trials} trials, profile `{params.profile}`, seeds {', '.join(map(str, definition.seeds))}. "
                 f"`hificl study {study}` runs it again, `hificl trace` leads from a number to its run.")  # fmt: skip
    return "\n\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
