"""The verbs of `hificl`: a file for each, or for a family of small ones, which files them by `register(line)`.

`hificl --help` reads every file, so none of them imports at its top what takes time: no torch, pydantic or MLflow.
"""

from __future__ import annotations

from pipeline.commands import (
    bench,
    completion,
    doctor,
    gallery,
    gc,
    miniature,
    names,
    params,
    plan,
    predict,
    reproduce,
    results,
    run_trial,
    score,
    studies,
    study,
    sweep,
    trace,
    tracking_server,
    trials,
    ui,
    where,
    workspace,
)
from pipeline.commands.parser import CommandLine

VERBS = (  # in the order in which the help lists them within their groups
    study, sweep, run_trial, workspace, where, studies, results, trials, trace, predict, ui, gallery, doctor, reproduce,
    gc, plan, params, names, score, bench, miniature, tracking_server, completion,
)  # fmt: skip


def register(line: CommandLine) -> None:
    """File every verb with a command line."""
    for verb in VERBS:
        verb.register(line)
