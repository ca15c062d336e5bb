"""What measures run in: a bench on the CPU, with requests that nobody has scored."""

from __future__ import annotations

import pytest

from pipeline.config.trial import EvaluationConfig
from pipeline.measure import Measured, MeasureJob, create_measure
from pipeline.train.workbench import Workbench


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(device="cpu")


def measured(bench: Workbench, name: str, requests: list, **settings: int) -> list[Measured]:
    jobs = []
    for request in requests:
        evaluation = EvaluationConfig(trial=request.config.key, max_new_tokens=8)
        jobs.append(MeasureJob("row", request, evaluation, None, ""))  # type: ignore[arg-type]
    return create_measure(name, settings, "a study").run(bench, jobs)
