"""Short real trials on the miniature, for the verbs that measure whole training runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.support.timing import Rounds
from pipeline import backbones, methods
from pipeline.config.load import BackboneSource, TrialRequest
from pipeline.config.trial import TrialConfig
from pipeline.miniature.world import write_world
from pipeline.records.trial import EpochReport
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks import tasks
from pipeline.train.loop import TrainingLoop
from pipeline.train.workbench import Workbench

BACKBONE, TASK = "mini-idefics2", "mini-vqa"
CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


class Trials:
    """Requests of trials on a small world below `folder`.

    Args:
        folder: where.
        num_samples: of each trial.
        backbone: which one is trained.
        source: where its weights lie; None: the miniature's.
        num_shots: demonstrations of a teacher.
        num_selection: samples that an epoch is scored on, at most, and `num_evaluation` that a trial is.
    """

    def __init__(
        self, folder: Path, num_samples: int, backbone: str = BACKBONE, source: BackboneSource | None = None,
        num_shots: int = 8, num_selection: int = 8, num_evaluation: int = 4,
    ) -> None:  # fmt: skip
        self.folder, self.num_samples, self.backbone, self.num_shots = folder, num_samples, backbone, num_shots
        self.source = source or BackboneSource(weights=str(CHECKPOINTS / BACKBONE))
        images = max(2 * num_samples + 40, num_samples + 2 * num_selection)
        write_world(folder / "data", num_train_images=images, num_val_images=num_evaluation + 6)
        self.manifest = draw_manifest(
            tasks.get(TASK), folder / "data", seed=0, num_train=num_samples, num_selection=num_selection,
            num_evaluation=num_evaluation,
        )  # fmt: skip
        self.manifest.save(folder / "manifest.json")
        self.digest = backbones.digest_of(backbone, self.source)

    def request(self, method: str, place: str, options: dict[str, Any], **fields: Any) -> TrialRequest:
        """Return the request of one epoch on all samples, in the miniature's own step unless told otherwise."""
        checked = methods.parse(method, options)
        facts = checked.facts()
        base: dict[str, Any] = {
            "num_train_samples": self.num_samples, "epochs": 1, "learning_rate": facts.learning_rate,
            "weight_decay": 0.05, "warmup_ratio": 0.1, "gradient_clip": 1.0, "micro_batch_size": 8, "accumulation": 1,
            "engine": "torch", "num_selection_samples": 2, "num_shots": self.num_shots if facts.is_shown else 0,
            "alignment_weight": facts.alignment_weight, "ground_truth_weight": facts.ground_truth_weight,
        }  # fmt: skip
        config = TrialConfig(
            backbone=self.backbone, backbone_digest=self.digest, task=TASK, manifest_digest=self.manifest.digest,
            method=method, options=checked.plain(), **{**base, **fields},
        )  # fmt: skip
        return TrialRequest(
            config=config, folder=str(self.folder / place / config.key), manifest=str(self.folder / "manifest.json"),
            source=self.source,
        )  # fmt: skip


@contextmanager
def trials(num_samples: int, **arguments: Any) -> Iterator[Trials]:
    """Give `Trials` in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Trials(Path(folder), num_samples, **arguments)


def train(bench: Workbench, requests: list[TrialRequest]) -> list[EpochReport]:
    """Train requests from nothing, together; return the metrics of each one's last epoch."""
    for request in requests:
        shutil.rmtree(request.folder, ignore_errors=True)
        bench.admit(request)
    last: dict[str, EpochReport] = {}
    while reports := bench.advance():
        last |= {report.key: report.metrics for report in reports if report.metrics}
    return [last[request.key] for request in requests]


def both_ways(bench: Workbench, requests: Callable[[str], list[TrialRequest]], repeats: int) -> Rounds:
    """Train the same trials one after another (`alone`), side by side (`together`), and so without equal bits.

    In rounds; the last is `batched`. On a GPU `together` is too. No training finds the teacher's targets that another
    one computed.

    Args:
        bench: where.
        requests: gives the trials, by the name of the place that they are trained in.
        repeats: rounds.
    """
    seconds: dict[str, list[float]] = {"alone": [], "together": [], "batched": []}
    for _ in range(repeats):
        for way, of_way in seconds.items():
            asked = requests(way)
            reports = []
            with patch.object(TrainingLoop, "exact", False) if way == "batched" else nullcontext():
                for group in [[request] for request in asked] if way == "alone" else [asked]:
                    _forget_teacher(bench)
                    reports += train(bench, group)
            of_way.append(sum(report.train_seconds or 0.0 for report in reports))
    return Rounds(seconds)


def _forget_teacher(bench: Workbench) -> None:
    if bench.loop is not None:
        bench.loop.resident.targets.clear()
