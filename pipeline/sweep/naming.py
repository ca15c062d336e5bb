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
    values = {**config.model_dump(mode="json"), **config.options}
    points = {**cell.vary, **{name: values[name] for name in cell.search if name in values}}
    place = [cell.row, cell.task, *([cell.backbone] if with_backbone else [])]
    return " ".join([*place, *(f"{name}={_short(value)}" for name, value in points.items()), f"seed={config.seed}",
                     config.key[:6]])  # fmt: skip


def description(params: Params, study: str, num_trials: int) -> str:
    """Return what a study's parent run says of itself, in Markdown."""
    definition = params.studies[study]
    lines = [f"**{definition.title}**"]
    lines.append(f"{num_trials} trials, profile `{params.profile}`, seeds {', '.join(map(str, definition.seeds))}. "
                 f"`hificl study {study}` runs it again, `hificl trace` leads from a number to its run.")  # fmt: skip
    return "\n\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
