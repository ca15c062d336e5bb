"""What is computed once and used by many trials: `hificl bench reuse`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.support.shapes import WORKLOADS, Bench, Workload
from benchmarks.support.steps import hificl_step
from benchmarks.support.timing import Findings, Rounds, alternate, main, one_thread, report
from pipeline.adapters.attach import attach


def run(
    device: str = "cpu",
    *,
    workloads: Mapping[str, Workload] | None = None,
    repeats: int = 9,
    teacher: Mapping[str, int] | None = MappingProxyType({}),
    images: Sequence[int] | None = (256, 1024, 4096),
) -> dict[str, Any]:
    """Time a HiFICL training step with an image's visual tokens at hand, and the same step from its pixels.

    The models are random, of the real architectures; on a CPU in sizes in which vision has the real share of the FLOPs
    for Idefics2. Both steps are forward, answer loss, backward, clip and AdamW. `vision_share` is vision tower and
    connector alone over the step from pixels. `teacher_shared_over_separate` compares trials of MimIC on the
    miniature that share one teacher pass with the same trials one at a time. `images_*_ms_N` is what an image's visual
    tokens cost among N on the miniature, in milliseconds: computed and filed, read from the disk by another process, in
    memory. On a CPU everything runs on one thread.

    Args:
        device: cpu or cuda.
        workloads: what is measured; None: the device's own.
        repeats: rounds.
        teacher: sizes of the teacher's part (`shared.teacher_pass`); None leaves it out.
        images: N; None leaves it out.
    """
    with one_thread(device):
        findings, visual = _visual(device, workloads=workloads, repeats=repeats)
        if teacher is not None:  # whole trials: this part needs what the pipeline needs
            from benchmarks.support.shared import teacher_pass

            findings.update(teacher_pass(device, **teacher))
        if images is not None:
            from benchmarks.support.shared import visual_tokens

            findings.update(visual_tokens(device, numbers=images))
    sizes = {"repeats": repeats, **{name: asdict(row.pop("workload")) for name, row in visual.items()}}
    return report(findings, device=device, method=run.__doc__, sizes=sizes, visual_tokens=visual)


def _visual(
    device: str, *, workloads: Mapping[str, Workload] | None = None, repeats: int = 9
) -> tuple[Findings, dict[str, Any]]:
    """Return `with_over_without_<backbone>` for every workload, and what it costs to keep an image's tokens.

    Args:
        device: cpu or cuda.
        workloads: what is measured; None: the device's own.
        repeats: rounds.
    """
    findings = Findings()
    kept: dict[str, Any] = {}
    for name, workload in (workloads or WORKLOADS[device]).items():
        bench = Bench(workload, device)
        rounds = times(bench, repeats, device)
        findings.add(f"with_over_without_{name}", rounds, "with", "without")
        findings.add(f"vision_share_{name}", rounds, "vision", "without")
        kept[name] = {"bytes_an_image": bench.visual.nbytes, "workload": workload}
    return findings, kept


def times(bench: Bench, repeats: int, device: str) -> Rounds:
    """Time HiFICL's step `with` visual tokens at hand and `without`, and the `vision` tower alone."""
    step, adapter = hificl_step(bench)
    ids = bench.ids()

    def vision() -> None:
        with torch.no_grad():
            bench.family.encode_images(bench.model, [bench.image] * bench.workload.batch)

    work = {"with": lambda: step(ids), "without": lambda: step(ids, pixels=True), "vision": vision}
    with attach(bench.model, adapter):
        return alternate(work, repeats, device=device)


if __name__ == "__main__":
    main(partial(run, teacher=None, images=None))
