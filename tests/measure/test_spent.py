"""What a trial says that it cost, against what torch counts while it trains."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.measure import create_measure
from pipeline.measure.costs import CountedFlops
from pipeline.records.store import TrialFolder
from pipeline.records.trial import TrialEnd
from pipeline.train.cost import Memory
from pipeline.train.loop import TrainingLoop
from pipeline.train.workbench import Workbench
from tests.measure.conftest import measured


def spent(bench: Workbench, request) -> tuple[float, TrialEnd]:
    """Train one epoch; return the FLOPs that were counted and the trial's end."""
    bench.admit(request)
    with CountedFlops() as counter:
        bench.advance()
    return counter.total, TrialFolder(Path(request.folder)).end()


@pytest.mark.parametrize("method", ["hificl", "mimic", "live", "lora"])
def test_a_trials_flops_are_those_that_it_spends(bench, trial, tmp_path, monkeypatch, method):
    monkeypatch.setattr(TrainingLoop, "_prefix_layout", lambda *_: None)  # what sharing saves is not taken off
    bench.admit(trial("hificl", tmp_path / "first", epochs=1))
    bench.advance()  # tokens of all images are at hand
    counted, end = spent(bench, trial(method, tmp_path / method, epochs=1, num_selection_samples=1))
    # beside training, one sample is scored and an image or two pass the tower
    assert end.train_flops < counted < 1.08 * end.train_flops


def test_the_peak_of_memory_is_the_trials_own(bench, trial, tmp_path):
    torch.ones(1 << 28).sum()  # 1 GiB, given back at once
    held = torch.ones(1 << 28)  # 1 GiB that stays
    request = trial("hificl", tmp_path / "memory", epochs=1)
    _, end = spent(bench, request)
    weights = sum(parameter.nbytes for parameter in bench.resident(request).loaded.model.parameters())
    assert weights < end.peak_memory_bytes < weights + held.nbytes // 2


def test_a_teacher_and_its_demonstrations_are_part_of_the_cost(bench, trial, tmp_path):
    plain, taught = trial("hificl", tmp_path, rank=2), trial("mimic", tmp_path, num_shots=2)
    without = trial("zero-shot", tmp_path, epochs=0)
    student, teacher, untrained = measured(bench, "training_cost", [plain, taught, without], num_samples=4, rounds=1)
    kind = create_measure("training_cost", {}, "a study")
    ratios = kind.relate(dict(teacher.numbers), dict(student.numbers))
    assert ratios["flops"] > 1.5 and ratios["time"] > 0 and ratios["gpu_memory"] > 0
    assert kind.relate(dict(student.numbers), dict(student.numbers))["time"] == 1 and untrained.numbers == {}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators give their pages back by themselves")
def test_what_earlier_trials_let_go_is_given_back():
    process = psutil.Process()
    pairs = [(torch.ones(2_000), torch.ones(20_000)) for _ in range(8_000)]
    pinned = [small for small, _ in pairs]
    del pairs  # 640 MB in holes between what stays
    before = process.memory_info().rss
    Memory(torch.nn.Linear(1, 1), "cpu")
    assert process.memory_info().rss < before - (400 << 20) and len(pinned) == 8_000
