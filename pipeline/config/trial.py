"""`TrialConfig`: everything that decides a number, and the key that its hash gives."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

State = Literal["attention", "residual-mid", "mlp", "residual"]  # of a decoder layer (`backbones.states`)
Kind = tuple[Literal["hidden"], State] | tuple[Literal["logits"], Literal[""]]  # of a teacher's target
# Trials in one forward pass at most. Measured: beyond these a CPU gains nothing, and Tune keeps a process for each.
MOST_PACKED = {"cuda": 8, "cpu": 4}
KEY_LENGTH = 16  # hex digits: 64 bits, no collision to fear in millions of trials


def canonical(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, so that equal values hash equally."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    # Fields that came later are no part of the key while they have their defaults: keys given before stay valid.
    later: ClassVar[frozenset[str]] = frozenset()

    @property
    def key(self) -> str:
        """Content key: equal configurations have equal keys on every machine."""
        unused = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return digest(self.model_dump(mode="json", exclude=unused))[:KEY_LENGTH]


class TrialConfig(_Config):
    """One training (or one method without training), by content.

    Fields that a method does not use are held at a neutral value by `plan.space`, so that a trial that two
    studies share has one key. `options` are the method's own (`rank`, `num_virtual_tokens`, ...).
    """

    backbone: str
    backbone_digest: str
    task: str
    manifest_digest: str
    method: str
    options: dict[str, Any] = {}
    num_train_samples: int = 0
    num_shots: int = 0
    seed: int = 0
    epochs: int = 0
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    warmup_ratio: float = 0.0
    gradient_clip: float = 0.0
    micro_batch_size: int = 0
    accumulation: int = 0
    loss_span: Literal["answer", "sequence"] = "answer"
    alignment_weight: float = 0.0
    ground_truth_weight: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    engine: Literal["deepspeed", "torch", "none"] = "none"
    zero_stage: int = 0
    offload: Literal["none", "cpu"] = "none"
    world_size: int = 1
    selection: Literal["selection", "test"] = "selection"
    selection_metric: Literal["score", "loss"] = "score"
    num_selection_samples: int = 0
    demonstration_draw: Literal["without-replacement", "with-replacement"] = "without-replacement"
    compile: bool = False
    gradient_checkpointing: bool = False
    deterministic: bool = False
    quantize: Literal["none", "int8", "nf4"] = "none"
    sample_draw: Literal["first", "by-seed"] = "first"
    parent: str = ""  # the key of the trial whose last epoch this one goes on from; its epochs count as this one's

    later: ClassVar[frozenset[str]] = frozenset(
        {
            "demonstration_draw", "compile", "sample_draw", "gradient_checkpointing", "deterministic",
            "quantize", "parent",
        }
    )  # fmt: skip

    @property
    def pool(self) -> tuple[str, int, str, int]:
        """What decides which samples of the training split the trial gets (`pipeline.data.manifest`)."""
        return self.manifest_digest, self.num_train_samples, self.sample_draw, self.seed

    @property
    def draws(self) -> tuple[str, int, str, int, int, str]:
        """What decides which demonstrations a teacher sees before a sample."""
        return (*self.pool, self.num_shots, self.demonstration_draw)

    @property
    def resident(self) -> tuple[str, ...]:
        """What decides which frozen model computes: equal for trials that can share one in memory."""
        stored = () if self.quantize == "none" else (self.quantize,)
        return self.backbone, self.backbone_digest, self.precision, *stored

    @property
    def trained(self) -> bool:
        """Whether there is anything to train."""
        return self.epochs > 0

    @property
    def name(self) -> str:
        """Readable name: method, task and the options that differ between runs of a sweep."""
        parts = [f"{k}={v}" for k, v in sorted(self.options.items()) if isinstance(v, int | float | str)]
        return " ".join([self.method, self.task, *parts, f"seed={self.seed}", self.key[:6]])


class EvaluationConfig(_Config):
    """How a trial is scored on the evaluation split; with the trial's key it decides the printed number.

    `task` and the digest of its samples are there where they are not those that the trial was trained on: its target.
    """

    trial: str
    task: str | None = None
    manifest_digest: str | None = None
    split: Literal["evaluation", "selection"] = "evaluation"
    num_samples: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int | None = None
    vqa_normalise: Literal["always", "official"] = "always"
    drop_incomplete_batch: int | None = None
    stem_predictions: bool = False

    later: ClassVar[frozenset[str]] = frozenset(
        {"drop_incomplete_batch", "stem_predictions", "task", "manifest_digest"}
    )


def engine_packs(config: TrialConfig) -> bool:
    """Whether several trials with this engine can share one backward pass: ZeRO-3 gathers parameters around each."""
    return config.engine == "torch" or config.zero_stage < 3
