"""Counted FLOPs and measured memory against what is known by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.core.errors import InputError
from pipeline.measure import create_measure, measures
from pipeline.measure.costs import CountedFlops, peak_bytes


def test_products_are_counted_forward_and_backward() -> None:
    x, w = torch.randn(5, 7), torch.randn(7, 3, requires_grad=True)
    with CountedFlops() as counted:
        (x @ w).sum().backward()
    assert counted.total == 2 * (2 * 5 * 7 * 3)  # x needs no gradient: one product back


def test_the_cpus_fused_attention_is_counted() -> None:
    q, k, v = (torch.randn(2, 3, 8, 16) for _ in range(3))
    with CountedFlops() as counted:
        F.scaled_dot_product_attention(q, k, v)
    assert counted.total == 2 * (2 * 2 * 3 * 8 * 8 * 16)


def test_the_peak_is_what_lives_at_once() -> None:
    with peak_bytes(cuda=False) as peak:
        a = torch.ones(1 << 18)
        b = torch.ones(1 << 18)
        del a
        c = torch.ones(1 << 18)
        del b, c
    assert 2 << 20 <= peak.value < 3 << 20


def test_settings_are_checked_and_ratios_refer_to_the_reference() -> None:
    assert set(measures.names()) >= {"score", "training_cost", "inference_cost", "latent_distance", "hallucination"}
    cost = create_measure("training_cost", {"rounds": 2}, "a study")
    numbers = {"milliseconds_per_sample": 30.0, "flops_per_sample": 8.0, "peak_bytes": 3.0}
    related = cost.relate(numbers, {"milliseconds_per_sample": 10.0, "flops_per_sample": 2.0, "peak_bytes": 2.0})
    assert (related["time"], related["flops"], related["gpu_memory"]) == (3.0, 4.0, 1.5)
    assert "time" not in cost.relate(numbers, None)
    with pytest.raises(InputError, match="Did you mean 'rounds'"):
        create_measure("training_cost", {"round": 2}, "a study")
    with pytest.raises(InputError, match="unknown measure"):
        create_measure("cost", {}, "a study")


def test_every_study_names_a_measure_and_its_settings() -> None:
    from pathlib import Path

    from pipeline.config.load import load

    params = load(Path(__file__).resolve().parents[2] / "params.yaml")
    for name, study in params.studies.items():
        create_measure(study.measure, study.measured, name)
