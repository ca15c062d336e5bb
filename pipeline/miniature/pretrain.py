"""Pre-train a miniature from nothing and save it as an ordinary transformers folder.

Run through `hificl pretrain`; at most half an hour on two quiet CPU cores. Numbers of steps are fixed, no
clock decides anything, so the same seed on the same kind of machine gives the same weights.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from pipeline.core.errors import InputError, nearest
from pipeline.core.progress import Report
from pipeline.miniature.decoder import DecoderPhase, train_decoder
from pipeline.miniature.documents import Curriculum
from pipeline.miniature.model import SIZES, Miniature, miniature
from pipeline.miniature.processor import save_processor
from pipeline.miniature.vision import Pool, VisionPhase, cache_visual_tokens, train_vision

RECORD = "pretraining.json"
NUM_THREADS = 2  # of the committed checkpoints: sums are rounded otherwise with another number


@dataclass(frozen=True)
class Budget:
    """How much is trained; the defaults are what the committed checkpoints had."""

    num_images: int = 30_000
    num_held_out: int = 1_000
    vision: VisionPhase = field(default_factory=VisionPhase)
    decoder: DecoderPhase = field(default_factory=DecoderPhase)

    @classmethod
    def tiny(cls, steps: int = 3) -> Budget:
        """Return a budget of a few steps, for tests of the code path."""
        return cls(
            num_images=64,
            num_held_out=16,
            vision=VisionPhase(steps=steps, batch_size=8, log_every=steps),
            decoder=DecoderPhase(
                steps=steps, log_every=steps, num_probe_documents=2, curriculum=Curriculum(num_documents=2)
            ),
        )


BUDGETS = {
    "small": Budget(),
    "large": Budget(  # a first guess, not yet run to its end
        num_images=100_000,
        vision=VisionPhase(steps=6000, batch_size=256),
        decoder=DecoderPhase(steps=9000, learning_rate=1e-3, curriculum=Curriculum(num_documents=64)),
    ),
}


def pretrain(
    backbone: str,
    out: Path,
    *,
    seed: int = 0,
    size: str = "small",
    device: str = "cpu",
    budget: Budget | None = None,
    commit: str | None = None,
    num_threads: int = NUM_THREADS,
    progress: Report = lambda done, total=None, note="": None,
) -> dict[str, object]:
    """Pre-train `backbone` and write it to `out`.

    Written are config, fp16 weights, tokenizer, processor and `pretraining.json` (configuration, seed,
    commit, curves, times).

    Args:
        backbone: `mini-idefics2` or `mini-llava`.
        out: a folder; made if missing.
        seed: of weights, images and documents.
        size: `small`, as the committed ones, or `large`, for a GPU.
        device: where it is trained. On a GPU sums may be rounded otherwise at each run.
        budget: numbers of steps and images; None: those of the size.
        commit: the code's commit, for the record.
        num_threads: threads of torch while this runs.
        progress: gets (steps done, steps of this phase, a line) now and then.

    Returns:
        what `pretraining.json` holds.

    Raises:
        InputError: unknown `backbone` or `size`.
    """
    spec = miniature(backbone)
    if size not in SIZES:
        raise InputError(f"unknown size '{size}'", way_out=nearest(size, SIZES))
    budget = budget or BUDGETS[size]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        model, record = _train(spec, spec.build(seed, SIZES[size]).to(device), seed, budget, progress)
    finally:
        torch.set_num_threads(before)
    record = {
        "backbone": backbone,
        "seed": seed,
        "size": size,
        "device": device,
        "commit": commit,
        "budget": asdict(budget),
        "num_threads": num_threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "machine": platform.machine(),
        **record,
    }
    save(spec, model, out)
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _train(
    spec: Miniature, model: PreTrainedModel, seed: int, budget: Budget, progress: Report
) -> tuple[PreTrainedModel, dict[str, object]]:
    start = time.monotonic()
    rng = np.random.default_rng(seed)
    pool, held_out = Pool.draw(budget.num_images, rng), Pool.draw(budget.num_held_out, rng)
    progress(0, budget.vision.steps, f"drew {budget.num_images:,} images")
    drawn = time.monotonic()
    vision = train_vision(spec, model, pool, held_out, budget.vision, rng, progress)
    visual = cache_visual_tokens(spec, model, pool.images)
    seen = time.monotonic()
    documents = np.random.default_rng([seed, 1])  # a stream of its own, so the phases can be tuned apart
    decoder = train_decoder(spec, model, pool.attributes.numpy(), visual, budget.decoder, documents, progress)
    seconds = {"images": drawn - start, "vision": seen - drawn, "decoder": time.monotonic() - seen}
    parameters = sum(p.numel() for p in model.parameters())
    return model, {"parameters": parameters, "seconds": seconds, "vision": vision, "decoder": decoder}


def save(spec: Miniature, model: PreTrainedModel, out: Path) -> None:
    """Write `model` (left in fp16) with tokenizer and processor, loadable by transformers' Auto classes."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = spec.make_tokenizer()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.cpu().half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written readable by its owner alone
    save_processor(spec, out)
