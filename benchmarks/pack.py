"""Trials in one forward pass against one after another: `hificl bench pack`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.shapes import DecoderShape, decoder
from benchmarks.support.timing import Findings, alternate, main, one_thread, report
from benchmarks.support.trials import BACKBONE, Trials, both_ways, train, trials
from pipeline import adapters
from pipeline.adapters.base import Adapter
from pipeline.adapters.pack import Pack, PackRows
from pipeline.backbones.decoder import told
from pipeline.config.load import TrialRequest
from pipeline.train.workbench import Workbench

RANKS = (8, 4, 2, 1)
# the curve's decoders, of four layers each, and its steps as rows x tokens of a row
WIDTHS = (128, 512)
STEPS = ((1, 16), (2, 32), (8, 32), (8, 128), (8, 512))
MOST_TOKENS = {"cpu": 2048, "cuda": 65536}  # of one pass


def run(
    device: str = "cpu", *, num_trials: Sequence[int] = (2, 4, 8), num_samples: int = 64, repeats: int = 3,
    curve_trials: Sequence[int] = (2, 4, 8, 16, 32), widths: Sequence[int] = WIDTHS,
) -> dict[str, Any]:  # fmt: skip
    """Train K HiFICL trials (of different ranks, rates and seeds) together, and the same ones one after another.

    Both on the miniature, resident in one process, by the same loop, from data to optimiser; scoring and checkpoints
    are left out (`train_seconds` of the trials' own records). On a CPU a pack gives each trial the bits that it has
    alone; `bits_over_batched_K` is what that takes, its seconds over those of a pack whose trials share attention too.
    `packed_over_sequential_K` is in samples per second, for the miniature's own step of 8 samples; `_papers_step` for
    the papers' step of 2 x 2. `loss_difference` is the largest difference of the epochs' mean losses, and
    `packed_equals_solo` 1 where, in fp32, every bit of losses and adapters is the same. `packed_over_sequential_DxTy`
    is where packs pay: HiFICL on random decoders of width x and four layers, y tokens a trial's step, by the number of
    trials, without data and bookkeeping; what exceeds 2,048 tokens a pass on a CPU is left out. On a CPU everything
    runs on one thread.

    Args:
        device: cpu or cuda.
        num_trials: K.
        num_samples: of each trial.
        repeats: rounds.
        curve_trials: K of the curve.
        widths: of its decoders.
    """
    findings = Findings()
    with one_thread(device), trials(num_samples) as made:
        bench = Workbench(device=device)
        train(bench, [_request(made, 0, "warm-up")])
        for name, step in {"": {}, "_papers_step": {"micro_batch_size": 2, "accumulation": 2}}.items():
            for k in num_trials:
                rounds = both_ways(bench, partial(_requests, made, k, step), repeats)
                findings.add(f"packed_over_sequential_K{k}{name}", rounds, "alone", "together")
                findings.add(f"bits_over_batched_K{k}{name}", rounds, "together", "batched")
        difference, equal = _compared(bench, made, max(num_trials), torch.float32)
        findings.file("loss_difference_fp32", [difference])
        findings.file("packed_equals_solo", [float(equal)])
        bench = Workbench(device=device)
        bench.resident(_request(made, 0, "double")).loaded.model.double()
        findings.file("loss_difference_fp64", [_compared(bench, made, max(num_trials), torch.float64)[0]])
    with one_thread(device):
        growth = {
            f"packed_over_sequential_D{width}T{rows * length}": _curve(
                device, width, rows, length, curve_trials, repeats
            )
            for width in widths
            for rows, length in STEPS
            if min(curve_trials) * rows * length <= MOST_TOKENS[device]
        }
    sizes = {"num_trials": list(num_trials), "num_samples": num_samples, "repeats": repeats, "backbone": BACKBONE}
    return report(findings, device=device, method=run.__doc__, sizes=sizes, growth=growth)


def _curve(
    device: str, width: int, rows: int, length: int, num_trials: Sequence[int], repeats: int
) -> dict[str, float]:
    """Return the samples a second of so many trials in one pass over those of one after another, by their number."""
    heads = width // 32
    shape = DecoderShape(width, 7 * width // 2, 4, heads, max(1, heads // 4))
    model = decoder(shape, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    found = {}
    for k in num_trials:
        if k * rows * length > MOST_TOKENS[device]:
            break
        trained = [adapters.create("hificl", model) for _ in range(k)]
        optimizers = [torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True) for adapter in trained]
        ids = torch.randint(0, shape.vocabulary, (k, rows, length), device=device)
        step = partial(_step, model, device)
        timed = alternate(
            {"alone": partial(_one_by_one, step, trained, optimizers, ids),
             "together": partial(step, trained, optimizers, ids)},
            repeats, device=device,
        )  # fmt: skip
        found[str(k)] = timed.ratio("alone", "together")
    return found


def _one_by_one(
    step: Callable[..., None], trained: Sequence[Adapter], optimizers: Sequence[torch.optim.Optimizer], ids: Tensor
) -> None:
    for adapter, optimizer, part in zip(trained, optimizers, ids, strict=True):
        step([adapter], [optimizer], part[None])


def _step(
    model: Any, device: str, trained: Sequence[Adapter], optimizers: Sequence[torch.optim.Optimizer], ids: Tensor
) -> None:
    """Forward and backward once for the trials' tokens [K, B, T], then clip and update each one's adapter."""
    pack = Pack(list(trained), apart=device == "cpu")  # as the training loop has it
    numbers = tuple(number for number in range(len(trained)) for _ in range(ids.shape[1]))
    pack.use(PackRows(numbers, (0,) * len(numbers), dict.fromkeys(range(len(trained)), ids.shape[2])))
    with adapters.attach(model, pack), told(device, padded=False):
        flat = ids.flatten(0, 1)
        hidden = model.model(input_ids=flat, use_cache=False).last_hidden_state[:, -5:-1]
        logits = model.lm_head(hidden).float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), flat[:, -4:].flatten(), reduction="none")
        losses.view(len(trained), -1).mean(1).sum().backward()
    for adapter, optimizer in zip(trained, optimizers, strict=True):
        torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _request(made: Trials, number: int, place: str, **step: Any) -> TrialRequest:
    options = {"rank": RANKS[number % len(RANKS)]}
    return made.request("hificl", place, options, learning_rate=0.005 * (1 + number / 10), seed=number, **step)


def _requests(made: Trials, k: int, step: dict[str, int], place: str) -> list[TrialRequest]:
    return [_request(made, i, place, **step) for i in range(k)]


def _compared(bench: Workbench, made: Trials, k: int, dtype: torch.dtype) -> tuple[float, bool]:
    """Train k trials alone and together; return the largest difference of their losses, and whether all is equal."""

    def trained(groups: list[list[int]], place: str) -> tuple[list[float], list[Tensor]]:
        losses, parameters = [], []
        for numbers in groups:
            requests = [_request(made, i, f"{place}-{dtype}") for i in numbers]
            for request in requests:
                bench.admit(request)
            adapters = {trial.config.key: trial.adapter.to(dtype) for trial in bench.loop.trials} if bench.loop else {}
            means: dict[str, float | None] = {}
            while reports := bench.advance():
                means |= {report.key: report.metrics.train_loss for report in reports if report.metrics}
            losses += [means[request.key] or 0.0 for request in requests]
            parameters += [x.detach() for request in requests for x in adapters[request.key].parameters()]
        return losses, parameters

    alone, solo = trained([[i] for i in range(k)], "alone")
    together, packed = trained([list(range(k))], "together")
    equal = alone == together and all(torch.equal(a, b) for a, b in zip(solo, packed, strict=True))
    return max(abs(a - b) for a, b in zip(alone, together, strict=True)), equal


if __name__ == "__main__":
    main(run)
