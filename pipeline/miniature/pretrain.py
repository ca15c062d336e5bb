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
from pipeline.core.plain_yaml import Json
from pipeline.core.progress import Report
from pipeline.miniature.decoder import DecoderPhase, train_decoder
from pipeline.miniature.documents import Curriculum
from pipeline.miniature.model import SIZES, Miniature, miniature, save_processor
from pipeline.miniature.render import NOISE
from pipeline.miniature.unfinished import FILE, Unfinished
from pipeline.miniature.vision import Pool, VisionPhase, cache_visual_tokens, train_vision
from pipeline.miniature.world import WORLDS, world_of

RECORD = "pretraining.json"


@dataclass(frozen=True)
class Budget:
    """How much is trained, and on what; the defaults are what the committed checkpoints of the first world had."""

    num_images: int = 30_000
    num_held_out: int = 1_000
    pixel_noise: int = NOISE
    num_threads: int = 2  # sums are rounded otherwise with another number
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
                steps=steps,
                log_every=steps,
                num_probe_documents=2,
                curriculum=Curriculum(num_documents=2, warm_up_documents=2),
            ),
        )


BUDGETS = {  # by world and size
    1: {
        "small": Budget(),
        "large": Budget(  # a first guess, not yet run to its end
            num_images=100_000,
            vision=VisionPhase(steps=6000, batch_size=256),
            decoder=DecoderPhase(steps=9000, learning_rate=1e-3, curriculum=Curriculum(num_documents=64)),
        ),
    },
    2: {
        "small": Budget(
            pixel_noise=WORLDS[2].pixel_noise,
            num_threads=1,
            decoder=DecoderPhase(probe_pairs=33, curriculum=Curriculum(num_pairs=33, num_documents=6, redraw=0.4)),
        ),
    },
    3: {
        "small": Budget(num_threads=1, decoder=DecoderPhase(sign_weight=0.3, curriculum=Curriculum(signed_share=0.5))),
    },
}


def pretrain(
    backbone: str,
    out: Path,
    *,
    world: int = 1,
    seed: int = 0,
    size: str = "small",
    device: str = "cpu",
    budget: Budget | None = None,
    commit: str | None = None,
    num_threads: int | None = None,
    progress: Report = lambda done, total=None, note="": None,
) -> dict[str, object]:
    """Pre-train `backbone` and write it to `out`.

    Written are config, fp16 weights, tokenizer, processor and `pretraining.json` (configuration, seed,
    commit, curves, times). What was interrupted goes on, to the same weights, where the same is asked for again with
    the same code: at its last record, which `unfinished.safetensors` holds until all is written.

    Args:
        backbone: `mini-idefics2` or `mini-llava`.
        out: a folder; made if missing.
        world: whose pictures it sees and whose annotators it hears.
        seed: of weights, images and documents.
        size: `small`, as the committed ones, or `large`, for a GPU.
        device: where it is trained. On a GPU sums may be rounded otherwise at each run.
        budget: numbers of steps and images; None: those of the size.
        commit: the code's commit, for the record.
        num_threads: threads of torch while this runs; None: the budget's.
        progress: gets (steps done, steps of this phase, a line) now and then.

    Returns:
        what `pretraining.json` holds.

    Raises:
        InputError: unknown `backbone`, `world` or `size`.
    """
    spec = miniature(backbone)
    world_of(world)
    if size not in BUDGETS[world]:
        raise InputError(f"world {world} has no size '{size}'", way_out=nearest(size, BUDGETS[world]))
    budget = budget or BUDGETS[world][size]
    before = torch.get_num_threads()
    num_threads = num_threads or budget.num_threads
    asked: Json = {
        "backbone": backbone,
        "world": world,
        "seed": seed,
        "size": size,
        "device": device,
        "commit": commit,
        "budget": json.loads(json.dumps(asdict(budget))),
        "num_threads": num_threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "machine": platform.machine(),
    }
    unfinished = Unfinished(out / FILE, asked)
    torch.set_num_threads(num_threads)
    try:
        model, came_out = _train(spec, spec.build(seed, SIZES[size]).to(device), seed, budget, progress, unfinished)
    finally:
        torch.set_num_threads(before)
    record = {**asked, **came_out}
    save(spec, model, out)
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.remove()
    return record


def _train(
    spec: Miniature, model: PreTrainedModel, seed: int, budget: Budget, progress: Report, unfinished: Unfinished
) -> tuple[PreTrainedModel, dict[str, object]]:
    start = time.monotonic()
    rng = np.random.default_rng(seed)
    pool, held_out = (Pool.draw(size, rng, budget.pixel_noise) for size in (budget.num_images, budget.num_held_out))
    progress(0, budget.vision.steps, f"drew {budget.num_images:,} images{unfinished.start(model)}")
    drawn = time.monotonic() - start
    if "decoder" not in unfinished.curves:
        train_vision(spec, model, pool, held_out, budget.vision, rng, progress, unfinished)
    visual = cache_visual_tokens(spec, model, pool.images)
    documents = np.random.default_rng([seed, 1])  # a stream of its own, so the phases can be tuned apart
    train_decoder(spec, model, pool.attributes.numpy(), visual, budget.decoder, documents, progress, unfinished)
    parameters = sum(p.numel() for p in model.parameters())
    return model, {"parameters": parameters, "seconds": {"images": drawn, **unfinished.seconds}, **unfinished.curves}


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
