"""What runs are called and what is written on their pages in MLflow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline import methods
from pipeline.config import Params
from pipeline.plan.plan import Plan
from pipeline.plan.space import Cell
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


def experiment_note(params: Params, study: str, cells: Iterable[Cell]) -> str:
    """Return what a study's experiment says of itself, in Markdown."""
    definition, mine = params.studies[study], [cell for cell in cells if cell.study == study]
    rows = dict.fromkeys(cell.label for cell in mine)
    places = (
        (f"`{name}`" for name in dict.fromkeys(getattr(one, kind) for one in mine)) for kind in ("task", "backbone")
    )
    tasks, backbones = (", ".join(names) for names in places)
    text = [definition.title, f"{', '.join(rows)}; for {tasks} on {backbones}, profile `{params.profile}`."]
    return "\n\n".join([*text, *filter(None, [definition.notes()])])


def sweep_note(params: Params, study: str, num_trials: int) -> str:
    """Return what a study's parent run says of itself, in Markdown."""
    definition = params.studies[study]
    lines = [definition.title]
    lines.append(f"{num_trials} trials, profile `{params.profile}`, seeds {', '.join(map(str, definition.seeds))}. "
                 f"`hificl study {study}` runs it again, `hificl trace` leads from a number to its run.")  # fmt: skip
    return "\n\n".join(lines)


def trial_note(plan: Plan, config: TrialConfig) -> str:
    """Return what a trial's run says of itself, in Markdown: what was trained on what, and for which study."""
    cell = plan.cells.get(plan.cell_of.get(config.key, ""))  # the one that asked for it first, where one did
    row = cell.label if cell else config.method
    if config.trained:
        step = config.micro_batch_size * config.accumulation * config.world_size
        rate = _short(config.learning_rate)
        samples = f"trained on {config.num_train_samples} samples for {config.epochs} epochs"
        done = f"{samples}, {step} a step, learning rate {rate}"
    else:
        shots = methods.options(config).shots
        done = f"nothing is trained; {f'{shots} demonstrations' if shots else 'no demonstration'} before each question"
    options = ", ".join(f"{name} {_short(value)}" for name, value in config.options.items())
    study = f"Asked for by *{plan.params.studies[cell.study].title}*, `{cell.study}`." if cell else ""
    more = " ".join(filter(None, [options and f"{options}.", study]))
    return f"{row} on `{config.backbone}` for `{config.task}`, seed {config.seed}: {done}.\n\n{more}".rstrip()


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
