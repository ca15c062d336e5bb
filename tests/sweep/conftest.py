"""Trials that processes lease, and what such a process does."""

from __future__ import annotations

import pytest

from pipeline.config.load import BackboneSource, load
from pipeline.plan.plan import Places, Plan
from pipeline.records.trial import Provenance
from pipeline.sweep import leases
from pipeline.train.workbench import Workbench
from tests.conftest import ROOT

SHORT = {"rank": 2, "epochs": 2, "num_train_samples": 8, "num_selection_samples": 1}  # two steps an epoch


@pytest.fixture
def plan(trial, small_world, tmp_path) -> Plan:
    """Two trials; the store is empty."""
    params = load(ROOT / "params.yaml")
    requests = [trial("lora", tmp_path, seed=seed, **SHORT) for seed in (0, 1)]
    sources = {"mini-idefics2": BackboneSource(weights=requests[0].source.weights)}
    made = Plan(params.model_copy(update={"backbones": sources}), Places(tmp_path / "runs", small_world, None))
    made.trials.update({request.key: request.config for request in requests})
    return made


def worked(plan: Plan) -> leases.Worked:
    """What a new process does; its process group is this one's."""
    worker = leases._Worker(plan.params)
    worker.bench = Workbench("cpu")
    with worker.listening():
        worker.run(plan, Provenance())
    return worker.worked
