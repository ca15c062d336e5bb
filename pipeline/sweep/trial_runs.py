"""What MLflow is told of trials and studies: names, parameters, samples, curves, and what stands on their pages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from pipeline import methods
from pipeline.config.load import Params
from pipeline.config.trial import TrialConfig
from pipeline.plan.plan import Places, Plan
from pipeline.plan.space import Cell
from pipeline.records.trial import EpochReport
from pipeline.tracking.records import MetricPoint, RunInput

POINTS = 200  # of a trial's losses in MLflow, where each takes 0.2 ms and 260 bytes
STEP_LOSS = "step/train_loss"  # a section of its own among the charts, beside the epochs' means in `train_loss`


def run_name(cell: Cell, config: TrialConfig, *, with_backbone: bool) -> str:
    """Return a trial's name: its row, its task, what varies and what is searched, seed, and the key's beginning.

    Args:
        cell: the cell that asked for the trial first.
        config: the trial.
        with_backbone: whether trials of several backbones stand beside each other.
    """
    parts = name_parts(cell, config)
    del parts["study"]
    if not with_backbone:
        del parts["backbone"]
    return " ".join([*parts.values(), config.key[:6]])


def name_parts(cell: Cell, config: TrialConfig) -> dict[str, str]:
    """Return what a trial is told apart by, kind by kind: its row, its task, ..., what varies and is searched, seed."""
    values = {**config.model_dump(mode="json"), **config.options}
    points = {**cell.vary, **{name: values[name] for name in cell.search if name in values}}
    named = {"row": cell.row, "task": cell.task, "backbone": cell.backbone, "study": cell.study}
    varied = {name: f"{name}={_short(value)}" for name, value in points.items()}
    return {**named, **varied, "seed": f"seed={config.seed}"}


def experiment_note(params: Params, study: str, cells: Iterable[Cell]) -> str:
    """Return what a study's experiment says of itself, in Markdown."""
    definition, cells = params.studies[study], [cell for cell in cells if cell.study == study]
    rows = dict.fromkeys(cell.label for cell in cells)
    tasks = ", ".join(f"`{task}`" for task in dict.fromkeys(cell.task for cell in cells))
    backbones = ", ".join(f"`{backbone}`" for backbone in dict.fromkeys(cell.backbone for cell in cells))
    text = [definition.title, f"{', '.join(rows)}; for {tasks} on {backbones}, profile `{params.profile}`."]
    return "\n\n".join([*text, *filter(None, [definition.notes()])])


def sweep_note(params: Params, study: str, num_trials: int) -> str:
    """Return what a study's parent run says of itself, in Markdown."""
    definition = params.studies[study]
    size = f"{num_trials} trials, profile `{params.profile}`, seeds {', '.join(map(str, definition.seeds))}."
    again = f"`hificl study {study}` runs it again, `hificl trace` leads from a number to its run."
    return f"{definition.title}\n\n{size} {again}"


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


def parameters(config: TrialConfig) -> dict[str, object]:
    """Return the configuration as MLflow params: the method's options beside the other fields, same names."""
    record = config.model_dump(mode="json")
    return {**{name: value for name, value in record.items() if name != "options"}, **record["options"]}


def used_by(config: TrialConfig, places: Places) -> list[RunInput]:
    """Return the samples that a trial learns from, or shows, and those that it chooses by."""
    used = []
    if config.trained or methods.options(config).shots:
        seed = f" {config.seed}" if config.sample_draw == "by-seed" else ""
        drawn = f"{config.num_train_samples} of train, {config.sample_draw}{seed}"
        context = "training" if config.trained else "demonstrations"
        used.append(_run_input(config, places, "train", context, drawn, config.num_train_samples))
    if methods.options(config).selects():
        if config.selection == "test":
            used.append(_run_input(config, places, "evaluation", "selection", "all of evaluation", None))
        else:
            drawn = f"{config.num_selection_samples} of selection, first"
            used.append(_run_input(config, places, "selection", "selection", drawn, config.num_selection_samples))
    return used


def scored_by(config: TrialConfig, places: Places, split: str, number: int) -> RunInput:
    """Return the samples that a trial was scored on."""
    return _run_input(config, places, split, "evaluation", f"{number} of {split}, first", number)


def _run_input(
    config: TrialConfig, places: Places, split: str, context: str, samples: str, rows: int | None
) -> RunInput:
    manifest = os.path.relpath(places.manifest(config.task), places.runs.parent)
    return RunInput(f"{config.task}/{split}", manifest, config.manifest_digest, context, samples, rows)


def metric_points(
    reports: Iterable[EpochReport], losses: Mapping[int, Sequence[float]], epochs: int
) -> list[MetricPoint]:
    """Return what a trial's epochs, and its losses of every step by epoch, are in MLflow."""
    points = [MetricPoint(name, report.epoch, report.metrics[name]) for report in reports for name in report.metrics]
    return [*points, *(MetricPoint(STEP_LOSS, step, loss) for step, loss in curve(losses, epochs))]


def curve(losses: Mapping[int, Sequence[float]], epochs: int) -> list[tuple[int, float]]:
    """Return steps and losses of a trial's curve: of every step, or means of so many that about `POINTS` are left."""
    points = []
    for epoch, values in losses.items():
        together = -(-epochs * len(values) // POINTS)
        for start in range(0, len(values), together):
            some = values[start : start + together]
            points.append(((epoch - 1) * len(values) + start + len(some), sum(some) / len(some)))
    return points


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
