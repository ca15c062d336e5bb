"""Task vector: a k-shot prompt's state at the last token, patched into the zero-shot run (Hendel et al. 2023)."""

from __future__ import annotations

from typing import ClassVar

import torch

from pipeline.baselines.base import BaselineOptions, baselines
from pipeline.baselines.vectors import Edit, VectorMethod, VectorOptions, last_states


class TaskVectorOptions(VectorOptions):
    """One prompt, as in the paper, unless `num_prompts` asks for a mean over several."""


@baselines.register
class TaskVector(VectorMethod):
    """h_l[last] <- theta_l, theta_l = h_l[last] of [k demonstrations ; dummy query] (Hendel et al. 2023).

    The dummy query is a sample of the pool, so that no query sees its own answer. With `num_prompts` above 1 theta_l
    is the mean over as many prompts.
    """

    name = "task-vector"
    Options: ClassVar[type[BaselineOptions]] = TaskVectorOptions

    def read(self) -> None:
        """Take the states after every layer, [L, D]."""
        states = []
        for shots in self.shots(self.options.num_prompts, "task-vector"):
            with last_states(self.spec.layers) as seen:
                self.run([shots])
            states.append(torch.cat(seen))
        self.vectors = torch.stack(states).mean(0)

    def edit(self, layer: int) -> Edit:
        """Put the vector in the state's place."""
        return self.vectors[layer].expand_as
