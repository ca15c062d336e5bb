"""A trial that goes on from its checkpoint equals one that was never interrupted, to the bit, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.records.store import TrialStore
from pipeline.train.workbench import Workbench

EPOCHS = 3
TRIALS = {
    "dropout": ("lora", {"rank": 2, "dropout": 0.3}),
    "demonstrations drawn anew for every sample": ("live", {}),
    "a teacher": ("mimic", {}),
    "parameter groups with rates of their own": ("hificl", {"teacher": True}),
}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(device="cpu")


def whole_state(folder: Path) -> dict:
    """Losses by step, schedule and scores by epoch, digests of adapter, optimiser and the chosen epoch's adapter."""
    state = json.loads((folder / f"checkpoint/epoch-{EPOCHS:04d}/state.json").read_text())
    rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in state["rows"]]
    losses = TrialStore(folder.parent).trial(folder.name).losses()
    assert [row["train_loss"] for row in rows] == [pytest.approx(sum(one) / len(one)) for one in losses.values()]
    return {"rows": rows, "losses": losses, "best": state["best"], "files": state["files"],
            "adapter": json.loads((folder / "done.json").read_text())["adapter_digest"]}  # fmt: skip


def go_on(bench: Workbench, request, epochs: int) -> int:
    """Take a trial up and train some epochs; return those that it had behind it."""
    behind = bench.admit(request)
    for _ in range(epochs):
        bench.advance()
    bench.evict(request.key)
    return behind


@pytest.mark.parametrize("name", TRIALS)
def test_a_resumed_trial_equals_an_undisturbed_one(bench, trial, tmp_path, name):
    method, given = TRIALS[name]
    whole, cut = (trial(method, tmp_path / place, epochs=EPOCHS, **given) for place in ("whole", "cut"))
    assert go_on(bench, whole, EPOCHS) == 0
    assert go_on(bench, cut, 1) == 0
    torch.manual_seed(99)  # another process, which has drawn other numbers
    torch.rand(1000)
    bench.loop.resident.targets.clear()
    assert go_on(bench, cut, 1) == 1
    newest = Path(cut.folder) / "checkpoint/epoch-0002"
    torn = max((p for p in newest.iterdir() if p.name != "state.json"), key=lambda p: p.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-1])
    assert go_on(bench, cut, 2) == 1  # the generation before
    assert whole_state(Path(cut.folder)) == whole_state(Path(whole.folder))
    steps = -(-whole.config.num_train_samples // (whole.config.micro_batch_size * whole.config.accumulation))
    losses = whole_state(Path(whole.folder))["losses"]
    assert {epoch: len(one) for epoch, one in losses.items()} == dict.fromkeys(range(1, EPOCHS + 1), steps)
