"""Plans of trials that are not trained: for tests of what a sweep keeps and logs of them."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import load
from pipeline.config.trial import TrialConfig
from pipeline.plan.plan import Places, Plan
from tests.conftest import ROOT


def make_plan(folder: Path, num_trials: int) -> Plan:
    """Return a plan of HiFICL trials on the miniature that differ in their seeds, to be kept below `folder`."""
    plan = Plan(load(ROOT / "params.yaml"), Places(folder / "runs", folder / "manifests", None))
    digests = {"backbone_digest": "0" * 64, "manifest_digest": "1" * 64}
    for seed in range(num_trials):
        config = TrialConfig(
            backbone="mini-idefics2", task="mini-vqa", method="hificl", seed=seed, epochs=2, num_train_samples=1000,
            **digests,
        )  # fmt: skip
        plan.trials[config.key] = config
    return plan
