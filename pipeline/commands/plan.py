"""`hificl plan`: what a study takes on the real backbones, before anything is downloaded."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, profile_name, settable, study_names
from pipeline.core.errors import InputError
from pipeline.core.terminal import Answer, Facts

if TYPE_CHECKING:
    from pipeline.cost.hours import Rates

REAL = "real"


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("check", "plan", plan, "the GPU-hours of a study on the real backbones", answers=True)
    study_names(parser.add_argument("--study", required=True))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of peak that is reached (default: 0.4)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 (default: an H100's 989)")
    parser.add_argument("--bandwidth-tb", type=float, default=3.35, help="memory, TB/s (default: an H100's 3.35)")
    profile_name(parser.add_argument("--profile", default=REAL))
    settable(parser)


def plan(args: argparse.Namespace) -> Answer:
    """Return the forecast of the command line."""
    from pipeline.cost.hours import Rates

    rates = Rates(args.peak_tflops, args.bandwidth_tb, args.utilisation)
    return Facts(forecast(args.study, gpus=args.gpus, rates=rates, profile=args.profile, overrides=args.set))


def forecast(
    study: str, *, gpus: int, rates: Rates, profile: str = REAL, overrides: list[str] | None = None
) -> dict[str, Any]:
    """Return the GPU-hours of a study on the real backbones.

    Args:
        study: its name.
        gpus: over which trials are spread.
        rates: of a GPU.
        profile: whose settings count.
        overrides: as `--set` takes them.

    Raises:
        InputError: unknown study or profile, or fewer than one GPU.
    """
    from pipeline.config.load import load
    from pipeline.cost import hours
    from pipeline.cost.steps import Prompt
    from pipeline.plan.inputs import drawn_samples, evaluated_samples, trials

    if gpus < 1:
        raise InputError(f"at least one GPU is needed, got {gpus}", where="--gpus")
    if not 0 < rates.utilisation <= 1:
        raise InputError(f"a share between 0 and 1 is needed, got {rates.utilisation}", where="--utilisation")
    params = load(overrides=overrides or [], profile=profile)
    planned = trials(params, study)
    evaluated = {task: evaluated_samples(params, task) for task in params.run.tasks}
    images = {task: drawn_samples(params, task) + count for task, count in evaluated.items()}
    prompt = Prompt()
    result = hours.forecast(planned, evaluated=evaluated, images=images, rates=rates, prompt=prompt)
    total = result.total
    return {
        "study": study, "profile": profile, "gpus": gpus, "gpu_hours": total, "wall_hours": total / gpus,
        "gpu_hours_with_shared_teacher": total - result.teacher_saved, "trials": result.trials,
        "gpu_hours_by_part": result.hours, "gpu_hours_by_method": result.by_method,
        "not_counted": result.not_counted,
        "assumed": {
            **asdict(rates), **asdict(prompt), "evaluation_samples": evaluated, "images_a_task": images,
            "picture": "480 x 640 pixels where a backbone keeps a picture's size",
        },
        "method": "FLOPs counted by the formulas of pipeline/cost from the real configurations; "
        "hours = FLOPs / (peak x utilisation), decoding = weights read / (bandwidth x utilisation). No GPU was asked.",
    }  # fmt: skip
