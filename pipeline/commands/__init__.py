"""The verbs of `hificl`: a file for each, or for those that belong together, which adds them by `register(line)`.

`hificl --help` reads every file, so none of them imports at its top what takes time: no torch, pydantic or MLflow.
"""

from __future__ import annotations

from pipeline.commands import doctor, numbers, plan, predict, results, slurm, studies, workspace
from pipeline.commands.parser import CommandLine

VERBS = (studies, slurm, doctor, results, plan, predict, numbers, workspace)  # as the help lists them


def register(line: CommandLine) -> None:
    """File every verb with a command line."""
    for verb in VERBS:
        verb.register(line)
