"""What is computed once and used by many trials: `hificl bench reuse`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

from pipeline.bench import _visual
from pipeline.bench._main import main
from pipeline.bench._shapes import Workload
from pipeline.bench._timing import one_thread, report


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
        teacher: sizes of the teacher's part (`_teacher.measure`); None leaves it out.
        images: N; None leaves it out.
    """
    with one_thread(device):
        found, visual = _visual.measure(device, workloads=workloads, repeats=repeats)
        if teacher is not None:  # whole trials: this part needs what the pipeline needs
            from pipeline.bench import _teacher

            found.update(_teacher.measure(device, **teacher))
        if images is not None:
            from pipeline.bench import _images

            found.update(_images.measure(device, numbers=images))
    sizes = {"repeats": repeats, **{name: asdict(row.pop("workload")) for name, row in visual.items()}}
    return report(found, device=device, method=run.__doc__, sizes=sizes, visual_tokens=visual)


if __name__ == "__main__":
    main(partial(run, teacher=None, images=None))
