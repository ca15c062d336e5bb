"""What a trial says that it cost, against what torch counts while it trains."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.measure.flops import CountedFlops
from pipeline.train import packed
from pipeline.train.workbench import Workbench


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(device="cpu")


def spent(bench: Workbench, request) -> tuple[float, dict]:
    """Train one epoch; return the FLOPs that were counted and the trial's end."""
    bench.admit(request)
    with CountedFlops() as counter:
        bench.advance()
    return counter.total, json.loads((Path(request.folder) / "done.json").read_text())


@pytest.mark.parametrize("method", ["hificl", "mimic", "live", "lora"])
def test_a_trials_flops_are_those_that_it_spends(bench, trial, tmp_path, monkeypatch, method):
    monkeypatch.setattr(packed, "_fold", lambda *_: None)  # what is folded away is not taken off
    bench.admit(trial("hificl", tmp_path / "first", epochs=1))
    bench.advance()  # tokens of all images are at hand
    counted, end = spent(bench, trial(method, tmp_path / method, epochs=1, num_selection_samples=1))
    # beside training, one sample is scored and an image or two pass the tower
    assert end["train_flops"] < counted < 1.08 * end["train_flops"]


def test_the_peak_of_memory_is_the_trials_own(bench, trial, tmp_path):
    held = psutil.Process().memory_info().rss
    torch.ones(1 << 28).sum()  # 1 GiB, given back at once
    _, end = spent(bench, trial("hificl", tmp_path / "memory", epochs=1))
    assert 0.8 * held < end["peak_memory_bytes"] < held + (1 << 29)
