"""A sweep over MimIC whose trials share one teacher pass, against the same trials one at a time."""

from __future__ import annotations

from pipeline.bench._timing import Findings
from pipeline.bench._trials import both_ways, train, trials
from pipeline.train.workbench import Workbench

LABEL = "teacher_shared_over_separate_K{}"


def measure(device: str, *, num_trials: int = 8, num_samples: int = 32, repeats: int = 3) -> Findings:
    """Time K trials of MimIC (8-shot teacher, different learning rates) on the miniature, both ways.

    Args:
        device: cpu or cuda.
        num_trials: K.
        num_samples: of each trial.
        repeats: rounds.
    """
    found = Findings()
    with trials(num_samples) as made:
        bench = Workbench(device=device)

        def requests(place: str) -> list:
            rates = [0.001 * (1 + i) for i in range(num_trials)]
            return [made.request("mimic", place, {}, learning_rate=rate, weight_decay=0.001) for rate in rates]

        train(bench, requests("warm-up")[:1])
        found.add(LABEL.format(num_trials), both_ways(bench, requests, repeats), "together", "alone")
    return found
