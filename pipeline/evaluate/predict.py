"""Answers of a resident backbone (with whatever is attached to it) for samples, with or without demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.adapters.pack import Pack
from pipeline.data.manifest import Manifest
from pipeline.data.prompt import stop_strings
from pipeline.data.sample import Sample
from pipeline.evaluate.generate import generate, of_part
from pipeline.tasks import tasks

if TYPE_CHECKING:
    from pipeline.train.resident import Resident

Demonstrations = Callable[[Sample], list[Sample]]


def predict(
    resident: Resident,
    manifest: Manifest,
    samples: Sequence[Sample],
    *,
    demonstrations: Demonstrations | None = None,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    batch_size: int = 64,
    from_pixels: bool = False,
    part: tuple[int, int] = (0, 1),
) -> dict[Any, str]:
    """Return the post-processed answer of every sample (of those in `part`), by id.

    Args:
        resident: backbone, tokenizer and visual tokens.
        manifest: of the samples.
        samples: the queries.
        demonstrations: gives each query's demonstrations; None: none.
        max_new_tokens: None: the task's own.
        num_beams: 1 is greedy.
        length_penalty: of beam search.
        batch_size: prompts at once.
        from_pixels: run the vision tower, for methods that train it.
        part: (i, n): every n-th batch from the i-th on.
    """
    if demonstrations is None:
        prompts = resident.alone(manifest, samples, answer=False)
    else:
        prompts = resident.prompts(manifest, samples, [demonstrations(sample) for sample in samples], answer=False)
    mine = of_part(prompts, batch_size, part)
    texts = _answers(
        resident, manifest, [prompts[i] for i in mine], max_new_tokens, num_beams=num_beams,
        length_penalty=length_penalty, batch_size=batch_size, from_pixels=from_pixels,
    )  # fmt: skip
    return {samples[i].sample_id: text for i, text in zip(mine, texts, strict=True)}


def predict_each(
    resident: Resident, manifest: Manifest, samples: Sequence[Sample], pack: Pack, members: Sequence[int],
    *, max_new_tokens: int | None = None, num_beams: int = 1, length_penalty: float = 1.0, batch_size: int = 64,
    from_pixels: bool = False, part: tuple[int, int] = (0, 1), on_batch: Callable[[], None] = lambda: None,
) -> list[dict[Any, str]]:  # fmt: skip
    """Return the answers of several adapters of a pack to the same samples, decoded in shared batches.

    Args:
        resident: backbone, tokenizer and visual tokens.
        manifest: of the samples.
        samples: the queries, without demonstrations.
        pack: the adapters that are attached.
        members: which of them answer.
        max_new_tokens: None: the task's own.
        num_beams: 1 is greedy.
        length_penalty: of beam search.
        batch_size: prompts at once.
        from_pixels: run the vision tower, for methods that train it.
        part: (i, n): every n-th batch from the i-th on.
        on_batch: called after every batch.

    Returns:
        one mapping of id to answer for every entry of `members`.
    """
    prompts = resident.alone(manifest, samples, answer=False) * len(members)
    mine = of_part(prompts, batch_size, part)
    texts = _answers(
        resident, manifest, [prompts[i] for i in mine], max_new_tokens, num_beams=num_beams,
        length_penalty=length_penalty, batch_size=batch_size, from_pixels=from_pixels,
        pack=pack, members=[members[i // len(samples)] for i in mine], on_batch=on_batch,
    )  # fmt: skip
    found: list[dict[Any, str]] = [{} for _ in members]
    for i, text in zip(mine, texts, strict=True):
        found[i // len(samples)][samples[i % len(samples)].sample_id] = text
    return found


def _answers(
    resident: Resident, manifest: Manifest, prompts: Sequence[Any], max_new_tokens: int | None, **decoding: Any
) -> list[str]:
    """Return the post-processed answers to prompts, ended as the task and the backbone's template end them."""
    task = tasks.get(manifest.task)
    texts = generate(
        resident.loaded,
        prompts,
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        visual_tokens=resident.visual,
        root=manifest.image_root,
        stop_strings=stop_strings(task.template, resident.loaded.backbone, manifest.prompt),
        **decoding,
    )
    return [task.postprocess(text) for text in texts]
