"""A HiFICL step with an image's visual tokens at hand, against the same step from its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.adapters.attach import attach
from pipeline.bench._shapes import WORKLOADS, Bench, Workload
from pipeline.bench._steps import hificl_step
from pipeline.bench._timing import Findings, alternate


def measure(
    device: str, *, workloads: Mapping[str, Workload] | None = None, repeats: int = 9
) -> tuple[Findings, dict[str, Any]]:
    """Return `with_over_without_<backbone>` for every workload, and what it costs to keep an image's tokens.

    Args:
        device: cpu or cuda.
        workloads: what is measured; None: the device's own.
        repeats: rounds.
    """
    found = Findings()
    kept: dict[str, Any] = {}
    for name, workload in (workloads or WORKLOADS[device]).items():
        bench = Bench(workload, device)
        step, adapter = hificl_step(bench)
        ids = bench.ids()

        def with_reuse(step: Any = step, ids: Any = ids) -> None:
            step(ids)

        def without(step: Any = step, ids: Any = ids) -> None:
            step(ids, pixels=True)

        def vision(bench: Bench = bench) -> None:
            with torch.no_grad():
                bench.family.encode_images(bench.model, [bench.image] * bench.workload.batch)

        with attach(bench.model, adapter):
            rounds = alternate({"with": with_reuse, "without": without, "vision": vision}, repeats, device=device)
        found.add(f"with_over_without_{name}", rounds, "with", "without")
        found.add(f"vision_share_{name}", rounds, "vision", "without")
        kept[name] = {"bytes_an_image": bench.visual.nbytes, "workload": workload}
    return found, kept
