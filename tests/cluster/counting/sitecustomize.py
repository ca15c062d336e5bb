"""Notes each step that a process trains, in a file of its own in the folder HIFICL_STEPS: `trial step`, a line each.

Python imports this at its start where the folder of this file is in PYTHONPATH. A line that is written is there when
the process is killed the moment after.
"""

import os
import sys
from importlib.machinery import PathFinder

LOOP = "pipeline.train.trial_run"


class Finder:
    """Finds the module of a trial's run, as it is, and has each finished step noted."""

    @staticmethod
    def find_spec(name, path, target=None):
        """Return the module's own spec, whose loader adds the note; None for all other modules."""
        if name != LOOP:
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            finish = module.TrialRun.finish_step

            def finish_and_note(trial, *args, **settings):
                log.write(f"{trial.config.key} {trial.step}\n")
                finish(trial, *args, **settings)

            module.TrialRun.finish_step = finish_and_note

        log = open(os.path.join(os.environ["HIFICL_STEPS"], str(os.getpid())), "a", buffering=1)  # noqa: SIM115, PTH118
        spec.loader.exec_module = exec_module
        return spec


if "HIFICL_STEPS" in os.environ:
    sys.meta_path.insert(0, Finder)
