"""Whether the numbers are right on a device: what it computes against fp64 on the CPU.

Errors are ||x - reference|| / ||reference||, the largest over a group's cases and tensors.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from benchmarks.support.lease import Lease
from benchmarks.support.shapes import DecoderShape, decoder
from pipeline import adapters, backbones
from pipeline.attention.kernels import causal_mask
from pipeline.attention.virtual import (
    merge_attention,
    merge_attention_reference,
    mimic_attention,
    mimic_attention_reference,
    virtual_attention,
)
from pipeline.backbones.decoder import compiled_parts, decoder_of
from pipeline.backbones.weights import QUANTIZED, dequantized, quantizable, quantize

if TYPE_CHECKING:  # whole trials need pictures and files; attention needs torch alone
    from benchmarks.support.trials import Trials
    from pipeline.train.workbench import Workbench

METHODS: dict[str, dict[str, Any]] = {"hificl": {}, "mimic": {}, "live": {}, "lora": {"dropout": 0.0}}
# By dtype; on a CPU a tenth of the first and half of the second is seen. fp32 leaves room for kernels that split a
# product into three of tf32.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}  # of attention alone
MODEL_BOUNDS = {"float32": 1e-4, "bfloat16": 6e-2}  # of a whole model: states or gradients

# ---------------------------------------------------------------------------------------------------------- attention

SHAPES = ((33, 33), (128, 128), (1, 97), (37, 97))  # queries, keys
MASKS = ("causal", "left", "right", "window", "additive")
FORMS = ("full", "one", "hidden", "batched", "mixed", "vector", "blend", "linear")
# 20 is no multiple of 8; a kernel is compiled for each
HEAD_SIZES = {"float32": (20, 64, 128), "bfloat16": (20, 64, 80, 128, 256)}


@dataclass(frozen=True)
class Case:
    """One call: its types, mask, form, head size, grouped keys and lengths."""

    dtype: str
    mask: str
    form: str
    size: int = 64
    groups: int = 4
    queries: int = 33
    keys: int = 33


def cases(dtype: str, mask: str) -> Iterator[Case]:
    """Yield the grid of one dtype and mask: all forms and lengths at one head size, then all head sizes."""
    for form, (queries, keys) in itertools.product(FORMS, SHAPES):
        yield Case(dtype, mask, form, queries=queries, keys=keys)
    for size, groups, form in itertools.product(HEAD_SIZES[dtype], (1, 4), ("full", "vector")):
        yield Case(dtype, mask, form, size, groups)


def attention(lease: Lease) -> None:
    """Compare outputs and all gradients over the grid."""
    for dtype, mask in itertools.product(("float32", "bfloat16"), MASKS):
        worst, where, count = 0.0, "", 0
        with lease.attempt(f"{dtype} {mask}"):
            grid = list(cases(dtype, mask))
            for case in grid[:: 11 if lease.rehearses else 1]:
                for name, error in attention_errors(case, lease.device).items():
                    count += 1
                    if not error <= worst:  # a NaN is the worst
                        worst, where = error, f"{name} of {case}"
            lease.check(f"attention_{dtype}_{mask}", worst, BOUNDS[dtype], worst=where, tensors=count)


def attention_errors(case: Case, device: str) -> dict[str, float]:
    """Return the errors of one call: its output with and without gradients, and every gradient."""
    ours, reference = _functions(case)
    mask, arguments, tensors = _inputs(case)
    results = []
    for function, dtype, place in ((reference, torch.float64, "cpu"), (ours, getattr(torch, case.dtype), device)):
        # queries, keys and values in the model's type; what is learned in fp32, as adapters are
        kinds = [dtype if i < 3 else torch.promote_types(dtype, torch.float32) for i in range(len(tensors))]
        leaves = [x.to(place, kind).requires_grad_() for x, kind in zip(tensors, kinds, strict=True)]
        placed = {name: value.to(place) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        hides = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        if hides is not None:
            placed["mask"] = hides.to(place)
        out = function(*leaves, **placed)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16)
        gradients = torch.autograd.grad(out, leaves, weights.to(place, out.dtype))
        with torch.no_grad():
            alone = function(*leaves, **placed)
        results.append([x.detach().double().cpu() for x in (out, alone, *gradients)])
    names = ["output", "output without gradients", *(f"gradient {i}" for i in range(len(tensors)))]
    return {name: _error(x, y) for name, x, y in zip(names, results[1], results[0], strict=True)}


def _error(x: Tensor, reference: Tensor) -> float:
    """Return the relative error; infinite where something is not finite."""
    if not torch.isfinite(x).all():
        return float("inf")
    return float((x - reference).norm() / reference.norm().clamp_min(1e-30))


def _functions(case: Case) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if case.form in ("vector", "blend", "linear"):
        form: Literal["vector", "blend"] = "vector" if case.form == "vector" else "blend"
        return partial(mimic_attention, form=form), partial(mimic_attention_reference, form=form)
    if case.form == "mixed":
        return _mixed, _mixed_reference
    alpha: Literal["full", "one"] = "one" if case.form == "one" else "full"
    return partial(merge_attention, alpha=alpha), partial(merge_attention_reference, alpha=alpha)


def _mixed(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, **arguments: Any) -> Tensor:
    takes = torch.tensor([True, False], device=q.device)
    return virtual_attention(q, k, v, keys=keys, values=values, replaces=takes, **arguments)


def _mixed_reference(*tensors: Tensor, mask: Tensor | None = None) -> Tensor:
    rows = []
    for row, alpha in enumerate(("full", "one")):
        part = [x[row : row + 1] for x in tensors]
        hides = mask if mask is None or mask.dim() < 3 or mask.shape[0] == 1 else mask[row : row + 1]
        rows.append(merge_attention_reference(*part, mask=hides, alpha=alpha))  # type: ignore[arg-type]
    return torch.cat(rows)


def _inputs(case: Case) -> tuple[Tensor | None, dict[str, Any], list[Tensor]]:
    """Return mask, further arguments, and tensors whose values are exact in bf16."""
    generator = torch.Generator().manual_seed(case.size + case.queries + case.keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    heads, tokens = 8, 5
    # transformers hands over transposed views
    tensors = [normal(2, case.queries, heads, case.size).transpose(1, 2)]
    tensors += [normal(2, case.keys, heads // case.groups, case.size).transpose(1, 2) for _ in range(2)]
    arguments: dict[str, Any] = {}
    if case.form in ("vector", "blend", "linear"):
        shift = (2, heads, case.queries, case.size) if case.form == "linear" else (heads, case.size)
        tensors += [normal(*shift), normal(2, heads, case.queries)]
    else:
        batch = (2,) if case.form in ("batched", "mixed") else ()
        tensors += [normal(*batch, heads, tokens, case.size) for _ in range(2)]
        if case.form == "hidden":
            arguments["virtual_mask"] = torch.arange(tokens) < torch.tensor([2, 4])[:, None, None]
    return _mask(case, generator), arguments, tensors


def _mask(case: Case, generator: torch.Generator) -> Tensor | None:
    seen = causal_mask(case.queries, case.keys, torch.device("cpu")).expand(2, 1, -1, -1).clone()
    if case.mask == "causal":
        return None
    if case.mask == "left":  # rows of padding see nothing
        seen[0, ..., : case.keys // 3] = False
    elif case.mask == "right":
        seen[0, ..., case.keys - case.keys // 3 :] = False
        seen[..., 0] = True
    elif case.mask == "window":
        seen &= ~torch.ones_like(seen).tril(case.keys - case.queries - 8)
    else:
        bias = torch.randn(2, 8, case.queries, case.keys, generator=generator).to(torch.bfloat16)
        return bias.masked_fill(~seen, float("-inf"))
    return seen


# ----------------------------------------------------------------------------------------------------- training steps


def training(lease: Lease, backbone: str) -> None:
    """Compare losses and gradients of every method's first step, and of all methods that pack in one pass.

    The loop's own code on the tiny model of a real architecture: pictures, prompts, teacher, losses. cuDNN's tf32 is
    left out: its convolutions of the vision tower are a thousandth off, on purpose.
    """
    from benchmarks.support.trials import trials
    from pipeline.config.load import BackboneSource

    torch.backends.cudnn.allow_tf32 = False
    with trials(8, backbone=backbone, source=BackboneSource(variant="tiny"), num_shots=2) as made:
        for method in METHODS:
            with lease.attempt(f"{method} {backbone}"):
                (expected,) = _steps(made, [method], "float64", "cpu")
                for dtype in ("float32", "bfloat16"):
                    (ours,) = _steps(made, [method], dtype, lease.device)
                    bound, end = MODEL_BOUNDS[dtype], f"{dtype}_{method}_{backbone}"
                    lease.check(f"step_{end}", _error(ours.gradient, expected.gradient), bound)
                    lease.check(f"loss_{end}", abs(ours.loss / expected.loss - 1), bound / 10)
        with lease.attempt(f"pack {backbone}"):
            packed = ["hificl", "mimic", "live", "hificl"]
            together = _steps(made, packed, "float32", lease.device)
            errors = []
            for number, (method, of_pack) in enumerate(zip(packed, together, strict=True)):
                (alone,) = _steps(made, [method], "float32", lease.device, first=number)
                errors.append(_error(of_pack.gradient, alone.gradient))
            lease.check(f"pack_over_alone_{backbone}", max(errors), MODEL_BOUNDS["float32"], by=errors)


@dataclass(frozen=True)
class _Step:
    loss: float
    gradient: Tensor  # of all parameters, one after another


def _steps(made: Trials, methods: Sequence[str], dtype: str, device: str, *, first: int = 0) -> list[_Step]:
    """Return what each trial's first micro-batch gives, all in one forward pass."""
    from pipeline.train.workbench import Workbench

    bench = Workbench(device=device)
    precision = "bf16" if dtype == "bfloat16" else "fp32"
    requests = [
        made.request(method, "exact", METHODS[method], precision=precision, seed=first + number, micro_batch_size=2)
        for number, method in enumerate(methods)
    ]
    if dtype == "float64":
        bench.resident(requests[0]).loaded.model.double()
    for request in requests:
        bench.admit(request)
    loop = bench.loop
    if loop is None:
        raise RuntimeError("no trial was admitted")
    learners = []
    for number, trial in enumerate(loop.trials):
        adapter = trial.adapter.double() if dtype == "float64" else trial.adapter
        learners.append(stirred(adapter, seed=first + number).train())
    parts = [of_trial[0] for of_trial in loop.next_steps(1)[0]]
    with adapters.attach(bench.resident(requests[0]).loaded.model, learners) as pack:
        losses = [of_part["train_loss"] for of_part in loop.losses(pack, parts)]
        gradients = [
            # a tower's last layers may lie above the states that the model takes
            torch.autograd.grad(value, list(adapter.parameters()), retain_graph=True, materialize_grads=True)
            for value, adapter in zip(losses, learners, strict=True)
        ]
    return [
        _Step(value.item(), torch.cat([x.detach().double().cpu().flatten() for x in of_adapter]))
        for value, of_adapter in zip(losses, gradients, strict=True)
    ]


def stirred(adapter: Any, seed: int = 0, std: float = 0.05) -> Any:
    """Move every parameter off its initial value, so that zero initialisation hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * std).to(parameter.device))
    return adapter


# ---------------------------------------------------------------------------------------------- compiled, and decoded

_SHAPE = DecoderShape(hidden=256, intermediate=512, layers=3, heads=8, kv_heads=2)


def compiled(lease: Lease) -> None:
    """Compare compiled parts with eager ones, under two adapters and two lengths, one after the other."""
    for dtype in ("float32", "bfloat16"):
        with lease.attempt(dtype):
            model: Any = decoder(_SHAPE, device=lease.device, dtype=getattr(torch, dtype))
            methods = enumerate(("hificl", "mimic", "hificl"))
            made = [stirred(adapters.create(name, model, seed=seed)) for seed, name in methods]
            forwards: Any = {}
            errors = []
            for adapter, length in itertools.product(made, (48, 65)):
                eager = _states(model, adapter, length)
                with compiled_parts(model, forwards):
                    errors += [_error(x, y) for x, y in zip(_states(model, adapter, length), eager, strict=True)]
            lease.check(f"compiled_over_eager_{dtype}", max(errors), MODEL_BOUNDS[dtype], by=errors)


def _states(model: Any, adapter: Any, length: int) -> tuple[Tensor, Tensor]:
    """Return hidden states and the adapter's gradients."""
    spec = decoder_of(model)
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(2, length, spec.hidden_size, generator=generator).to(like) for _ in range(2))
    parameters = list(adapter.parameters())
    with adapters.attach(model, adapter):
        hidden = spec.decoder(inputs_embeds=x, use_cache=False).last_hidden_state
        gradients = torch.autograd.grad((hidden * weights).float().mean(), parameters)
    return hidden.detach().double().cpu(), torch.cat([g.double().cpu().flatten() for g in gradients])


def quantized(lease: Lease) -> None:
    """Compare a decoder in 8 and in 4 bits with fp64 over the numbers that its weights stand for; and what is read."""
    for kind, dtype in itertools.product(QUANTIZED[1:], ("float32", "bfloat16")):
        with lease.attempt(f"{kind} {dtype}"):
            plain: Any = decoder(_SHAPE, device="cpu", dtype=torch.float32)
            ours = copy.deepcopy(plain).to(lease.device, getattr(torch, dtype))
            names = list(quantizable(ours))
            quantize(ours, kind)
            for name in names:
                plain.get_submodule(name).weight.data = dequantized(ours.get_submodule(name)).cpu().double()
            plain = plain.double()
            for method, options in METHODS.items():
                adapter = stirred(adapters.create(method, ours, **options))
                expected = _states(plain, copy.deepcopy(adapter).cpu().double(), 48)
                errors = [_error(x, y) for x, y in zip(_states(ours, adapter, 48), expected, strict=True)]
                lease.check(f"quantized_{kind}_{dtype}_{method}", max(errors), MODEL_BOUNDS[dtype], by=errors)
    for kind in QUANTIZED[1:]:
        with lease.attempt(f"{kind} from a folder"):
            lease.check(f"quantized_{kind}_as_it_is_read", _read_differs(kind, lease.device), 0)


def _read_differs(kind: str, device: str) -> int:
    """Return how many modules of a tiny Idefics2 hold other weights read into few bits than stored so afterwards."""
    settings: dict[str, Any] = {"dtype": "bf16", "device": device}
    with tempfile.TemporaryDirectory() as folder:
        made = backbones.load("idefics2-8b-base", variant="tiny", dtype="bf16")
        made.model.save_pretrained(folder)
        made.processor.save_pretrained(folder)
        read, after = (
            backbones.load("idefics2-8b-base", weights=folder, quantized=given, **settings).model
            for given in (kind, "none")
        )
    names = list(quantizable(after))
    quantize(after, kind)
    pairs = [[dequantized(model.get_submodule(name)) for model in (read, after)] for name in names]
    return sum(not torch.equal(*pair) for pair in pairs) + len(quantizable(read)) + (not names)


def decoding(lease: Lease) -> None:
    """Compare hidden states decoded token by token behind a cache, left padding included, with one fp64 pass."""
    for dtype, method in itertools.product(("float32", "bfloat16"), ("hificl", "mimic", "live")):
        with lease.attempt(f"{dtype} {method}"):
            model: Any = decoder(_SHAPE, device="cpu", dtype=torch.float32)
            adapter = stirred(adapters.create(method, model))
            expected = _whole(copy.deepcopy(model).double(), copy.deepcopy(adapter).double())
            ours = _token_by_token(model.to(lease.device, getattr(torch, dtype)), adapter.to(lease.device))
            lease.check(f"cached_over_whole_{dtype}_{method}", _error(ours, expected), MODEL_BOUNDS[dtype])


_PROMPT, _PADS = 40, 7


def _padded() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 500, (2, _PROMPT + 6), generator=torch.Generator().manual_seed(2))
    seen = torch.ones_like(ids)
    seen[0, :_PADS] = 0
    return ids, seen, (seen.cumsum(1) - 1).clamp(min=0)


def _whole(model: Any, adapter: Any) -> Tensor:
    ids, seen, positions = _padded()
    with torch.no_grad(), adapters.attach(model, adapter):
        out = model.model(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, _PROMPT:].double()


def _token_by_token(model: Any, adapter: Any) -> Tensor:
    ids, seen, positions = (x.to(next(model.parameters()).device) for x in _padded())
    states, cache = [], None
    with torch.no_grad(), adapters.attach(model, adapter):
        for start, end in [(0, _PROMPT), *((i, i + 1) for i in range(_PROMPT, ids.shape[1]))]:
            out = model.model(
                input_ids=ids[:, start:end], attention_mask=seen[:, :end], position_ids=positions[:, start:end],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            states.append(out.last_hidden_state)
    return torch.cat(states[1:], 1).double().cpu()


# -------------------------------------------------------------------------------------------------------- whole trials


def whole_trials(lease: Lease) -> None:
    """Train an epoch, choose it and answer a split, on the miniature in bf16: each method alone, then four together."""
    from benchmarks.support.trials import trials
    from pipeline.train.workbench import Workbench

    with trials(16) as made:
        bench = Workbench(device=lease.device)
        groups: dict[str, Iterable[str]] = {**{method: [method] for method in METHODS}, "pack": list(METHODS)[:3]}
        for name, methods in groups.items():
            with lease.attempt(name):
                _whole_trial(lease, made, bench, name, methods)


def _whole_trial(lease: Lease, made: Trials, bench: Workbench, name: str, methods: Iterable[str]) -> None:
    from pipeline.config.trial import EvaluationConfig

    requests = [made.request(method, f"whole-{name}", {}, precision="bf16") for method in methods]
    losses: list[float] = []
    try:
        for request in requests:
            bench.admit(request)
        while reports := bench.advance():
            losses += [report.metrics.train_loss or float("nan") for report in reports if report.metrics]
    finally:  # one that failed is not trained with the next
        for request in requests:
            bench.evict(request.key)
    answers = [bench.score(request, EvaluationConfig(trial=request.key, num_samples=4)) for request in requests]
    wrong = sum(not value < float("inf") for value in losses) + abs(len(losses) - len(requests))
    lease.check(f"whole_trial_{name}", wrong + abs(len(answers) - len(requests)), 0, losses=losses)
