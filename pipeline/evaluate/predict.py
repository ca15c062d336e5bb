"""Answers of a resident backbone (with whatever is attached to it) for samples, with or without demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.adapters.pack import Pack
from pipeline.data.manifest import Manifest
from pipeline.data.sample import Sample
from pipeline.evaluate.generate import generate, of_part
from pipeline.prompts.prompt import Encoded, stop_strings
from pipeline.resident.resident import Resident
from pipeline.tasks import of_manifest

SplitPart = tuple[int, int]  # (i, n): every n-th batch from the i-th on
WHOLE: SplitPart = (0, 1)


@dataclass(frozen=True)
class Decoding:
    """How answers are generated.

    Attributes:
        max_new_tokens: None: the task's own.
        num_beams: 1 is greedy.
        length_penalty: of beam search.
        batch_size: prompts at once.
        from_pixels: run the vision tower, for methods that train it.
    """

    max_new_tokens: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    batch_size: int = 64
    from_pixels: bool = False


@dataclass(frozen=True)
class Answers:
    """What a trial answered in one part of a split.

    Attributes:
        texts: answer by sample id.
        seconds: the trial's share of what the part took.
        found: what a method without training found out first.
    """

    texts: dict[Any, str]
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)


def predict(
    resident: Resident,
    manifest: Manifest,
    samples: Sequence[Sample],
    decoding: Decoding,
    demonstrations: Callable[[Sample], list[Sample]] | None = None,
    part: SplitPart = WHOLE,
) -> dict[Any, str]:
    """Return the answer to every sample of the `part`, by id; behind its `demonstrations`, where there are any."""
    if demonstrations is None:
        prompts = resident.alone(manifest, samples, answer=False)
    else:
        prompts = resident.prompts(manifest, samples, [demonstrations(sample) for sample in samples], answer=False)
    chosen = of_part(prompts, decoding.batch_size, part)
    texts = _answers(resident, manifest, [prompts[i] for i in chosen], decoding)
    return {samples[i].sample_id: text for i, text in zip(chosen, texts, strict=True)}


def predict_each(
    resident: Resident,
    manifest: Manifest,
    samples: Sequence[Sample],
    pack: Pack,
    members: Sequence[int],
    decoding: Decoding,
    part: SplitPart = WHOLE,
    on_batch: Callable[[], None] = lambda: None,
) -> list[dict[Any, str]]:
    """Return what the `members` of a pack answer to the same samples, decoded in shared batches.

    Returns:
        One mapping of id to answer for every entry of `members`.
    """
    prompts = resident.alone(manifest, samples, answer=False) * len(members)
    chosen = of_part(prompts, decoding.batch_size, part)
    of_chosen = [members[i // len(samples)] for i in chosen]
    texts = _answers(
        resident, manifest, [prompts[i] for i in chosen], decoding, pack=pack, members=of_chosen, on_batch=on_batch
    )
    answers: list[dict[Any, str]] = [{} for _ in members]
    for i, text in zip(chosen, texts, strict=True):
        answers[i // len(samples)][samples[i % len(samples)].sample_id] = text
    return answers


def _answers(
    resident: Resident, manifest: Manifest, prompts: Sequence[Encoded], decoding: Decoding, **of_pack: Any
) -> list[str]:
    """Return the answers to prompts, cut where the task's template and the backbone's say."""
    task = of_manifest(manifest)
    return generate(
        resident.loaded,
        prompts,
        max_new_tokens=decoding.max_new_tokens or task.max_new_tokens,
        visual_tokens=resident.visual,
        root=manifest.image_root,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        stop_strings=stop_strings(task.template, resident.loaded.backbone, manifest.prompt),
        batch_size=decoding.batch_size,
        from_pixels=decoding.from_pixels,
        **of_pack,
    )
