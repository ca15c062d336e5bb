"""What `hificl bench cuda` times: steps, packs, decoding and reuse of full-size random models."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import decode, reuse
from benchmarks.step import RATIOS, callables, count, peak
from benchmarks.support.lease import Lease
from benchmarks.support.shapes import LEASE, Bench
from benchmarks.support.steps import floor_step, hificl_step, lora_step, mimic_step, packed_steps
from benchmarks.support.timing import Findings, Rounds, alternate
from pipeline import adapters
from pipeline.adapters.attach import attach
from pipeline.attention import virtual
from pipeline.backbones.decoder import Forwards, compiled_parts, told
from pipeline.backbones.weights import QUANTIZED, quantize
from pipeline.evaluate.generate import Greedy

PACKS = (1, 2, 4, 8, 16, 32, 64)
DECODED = (8, 64)  # rows of a batch


def ceilings(lease: Lease) -> None:
    """Measure what the card reaches."""
    for name, value in lease.ceilings().items():
        lease.number(name, value)


def step(lease: Lease, name: str) -> None:
    """Time every step over what it is compared with, and say how much of the card it uses and keeps."""
    bench = lease.bench(name)
    work, left_out = callables(bench)
    if left_out:
        lease.write(left_out=left_out)
    seconds: dict[str, list[float]] = {}
    for label, of, over in RATIOS:
        if of in work:
            with lease.attempt(label):
                rounds = alternate({of: work[of], over: work[over]}, _repeats(lease, 7), device=lease.device)
                lease.ratio(f"{label}_{name}", rounds, of, over)
                seconds |= {of: rounds.seconds[of], over: rounds.seconds[over]}
    for label, values in seconds.items():
        lease.milliseconds(f"{label}_ms_{name}", values)
    with lease.attempt("FLOPs"):
        counted = count(bench, Rounds(seconds), lease.device)
        flops = counted["flops_a_sample"]
        for label, of, over in RATIOS:
            if of in flops and over in flops:
                lease.number(f"{label}_flops_{name}", flops[of] / flops[over])
        for label, rate in counted["flops_a_second"].items():
            lease.number(f"{label}_teraflops_{name}", rate / 1e12)
        for label, share in (counted.get("utilisation") or {}).items():
            lease.number(f"{label}_utilisation_{name}", share)
    if lease.device == "cuda":
        peaks: dict[str, float] = {}
        for label in seconds:
            with lease.attempt(f"memory of {label}"):
                peaks[label] = peak(work[label])
                lease.number(f"{label}_peak_gib_{name}", peaks[label])
        for label, of, over in RATIOS:
            if of in peaks and over in peaks:
                lease.number(f"{label}_memory_{name}", peaks[of] / peaks[over])


def packs(lease: Lease, name: str) -> None:
    """Time K trials of HiFICL in one pass over K times the step of one: over K, and so over the tokens of a step."""
    bench = lease.bench(name)
    shape = bench.workload
    _, one = packed_steps(bench, 1)
    for k in (1, 2) if lease.rehearses else PACKS:
        with lease.attempt(f"K = {k}"):
            together, _ = packed_steps(bench, k)
            rounds = alternate({"together": together, "one": one}, _repeats(lease, 5), device=lease.device)
            low, high = (k * value for value in rounds.spread("one", "together"))
            tokens = k * shape.batch * (shape.visual_tokens + shape.text_tokens)
            ratio, label = k * rounds.ratio("one", "together"), f"packed_over_sequential_K{k}_{name}"
            lease.number(label, ratio, [low, high], tokens=tokens, seconds=rounds.median("together"))
            if lease.device == "cuda":
                lease.number(f"packed_peak_gib_K{k}_{name}", peak(together))
            del together
            if k > 1 and lease.left < 30 and not lease.rehearses:
                lease.write(part=f"K > {k}", skipped="no time")
                break


def fused(lease: Lease, name: str) -> None:
    """Time HiFICL's step with the virtual side as one kernel over the same by torch's operators."""
    bench = lease.bench(name)
    ids = bench.ids()
    train, adapter = hificl_step(bench)

    def on(device: str) -> Callable[[], None]:
        def run() -> None:
            with patch.object(virtual, "FUSED_ON", device), attach(bench.model, adapter):
                train(ids)

        return run

    if lease.device == "cuda":
        lease.number("virtual_kernel_is_used", float(virtual.fused_on(ids.device) is not None))
    rounds = alternate({"kernel": on("cuda"), "operators": on("none")}, _repeats(lease, 9), device=lease.device)
    lease.ratio(f"virtual_kernel_over_operators_{name}", rounds, "kernel", "operators")


def compiled(lease: Lease, name: str) -> None:
    """Time HiFICL and the floor with the decoder's frozen parts compiled (`train.compile`), and without."""
    bench, forwards = lease.bench(name), Forwards()
    ids = bench.ids()
    train, adapter = hificl_step(bench)
    floor = floor_step(bench)

    def hificl() -> None:
        with attach(bench.model, adapter):
            train(ids)

    def within(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with compiled_parts(bench.model, forwards):
                work()

        return run

    work = {"floor": floor, "hificl": hificl, "floor_parts": within(floor), "hificl_parts": within(hificl)}
    rounds = alternate(work, _repeats(lease, 7), warmup=2, device=lease.device)
    lease.ratio(f"compiled_step_over_floor_{name}", rounds, "hificl_parts", "floor_parts")
    lease.ratio(f"compiled_parts_over_eager_{name}", rounds, "hificl_parts", "hificl")
    lease.ratio(f"compiled_floor_over_eager_{name}", rounds, "floor_parts", "floor")
    lease.milliseconds(f"compiled_hificl_ms_{name}", rounds.seconds["hificl_parts"])


def decoding(lease: Lease, name: str) -> None:
    """Time a decoded token with HiFICL, and the fewest bytes that it must read at the copy's rate over that."""
    loaded = lease.bench(name)
    few, many = (2, 4) if lease.rehearses else (4, 36)
    adapter = adapters.create("hificl", loaded.model)
    for rows in (2,) if lease.rehearses else DECODED:
        with lease.attempt(f"{rows} rows"):
            bench = _with_rows(loaded, rows)
            work = {
                f"{label}_{tokens}": _generates(bench, tokens, wears)
                for tokens in (few, many) for label, wears in (("plain", None), ("adapter", adapter))
            }  # fmt: skip
            rounds = alternate(work, _repeats(lease, 3), device=lease.device)
            tokens: dict[str, list[float]] = {}
            for label in ("plain", "adapter"):
                both = zip(rounds.seconds[f"{label}_{many}"], rounds.seconds[f"{label}_{few}"], strict=True)
                tokens[label] = [max(1e-9, (long - short) / (many - few)) for long, short in both]
                lease.milliseconds(f"decoded_token_ms_{label}_B{rows}_{name}", tokens[label])
            length = bench.workload.visual_tokens + bench.workload.text_tokens + (few + many) // 2
            bound = _bytes_a_token(bench, rows, length) / lease.ceilings()["copy_bytes_a_second"]
            lease.number(f"weight_read_ms_B{rows}_{name}", 1000 * bound)
            tokens |= _recorded_tokens(lease, bench, adapter, few, many, name)
            for label in tokens:
                share = bound / Rounds(tokens).median(label)
                lease.number(f"weight_read_over_decoded_token_{label}_B{rows}_{name}", share)
            lease.ratio(f"decoded_token_over_plain_B{rows}_{name}", Rounds(tokens), "adapter", "plain")


def _recorded_tokens(
    lease: Lease, bench: Bench, adapter: Any, few: int, many: int, name: str
) -> dict[str, list[float]]:
    """Return the seconds of a token by a recorded pass, without and with the adapter; none where none is recorded."""
    loaded: Any = SimpleNamespace(
        model=bench.model, device=bench.device, family=bench.family, never_generated=[], eos_token_ids=[]
    )
    ids, rows = bench.ids(), bench.workload.batch
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    inputs = {**bench.inputs(ids), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    writers = {"recorded_plain": Greedy(loaded), "recorded_adapter": Greedy(loaded)}

    def writes(label: str, tokens: int) -> Callable[[], list[list[int]] | None]:
        def write() -> list[list[int]] | None:
            with ExitStack() as stack, torch.no_grad(), told(bench.device, padded=True):
                if label == "recorded_adapter":
                    stack.enter_context(attach(bench.model, adapter))
                return writers[label].write(dict(inputs), tokens, lambda _: False, (None, None))

        return write

    seconds: dict[str, list[float]] = {}
    for label, writer in writers.items():
        work = {str(tokens): writes(label, tokens) for tokens in (few, many)}
        rounds = alternate(work, _repeats(lease, 3), device=lease.device)
        lease.check(f"{label}_is_used_B{rows}_{name}", float(writer.is_off), 0.0)
        if writer.is_off:
            continue
        both = zip(rounds.seconds[str(many)], rounds.seconds[str(few)], strict=True)
        seconds[label] = [max(1e-9, (long - short) / (many - few)) for long, short in both]
        lease.milliseconds(f"decoded_token_ms_{label}_B{rows}_{name}", seconds[label])
        writer.forget()
    return seconds


def _with_rows(bench: Bench, rows: int) -> Bench:
    """Return the same model with batches of another size."""
    other = object.__new__(Bench)
    other.__dict__ = {**bench.__dict__, "workload": replace(bench.workload, batch=rows)}
    return other


def _generates(bench: Bench, tokens: int, adapter: Any) -> Callable[[], None]:
    ids = bench.ids()
    settings: dict[str, Any] = {
        "do_sample": False, "use_cache": True, "min_new_tokens": tokens, "max_new_tokens": tokens,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    settings["attention_mask"][0, 0] = 0  # evaluation pads on the left and hands a mask to every call

    def generate() -> None:
        with ExitStack() as stack, torch.no_grad():
            if adapter is not None:
                stack.enter_context(attach(bench.model, adapter))
            bench.model.generate(**bench.inputs(ids), **settings)

    return generate


def _bytes_a_token(bench: Bench, rows: int, length: int) -> int:
    """Return what a decoded token reads at least: every weight of decoder and output once, and the rows' cache."""
    spec = bench.spec
    embedding = bench.model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in spec.decoder.parameters() if p is not embedding)
    weights += bench.model.get_output_embeddings().weight.nbytes
    cache = 2 * rows * length * spec.num_layers * spec.num_kv_heads * spec.head_dim
    return weights + cache * embedding.element_size()


def quantized(lease: Lease, name: str) -> None:
    """Time and weigh a step and decoded tokens over the decoder in 8 and in 4 bits, beside it as it is."""
    lease.forget()
    benches: dict[str, Bench] = {}
    for kind in QUANTIZED:
        with lease.attempt(kind):
            before, started = _allocated(lease), time.perf_counter()
            bench = Bench(LEASE[lease.device][name], lease.device)
            if kind != "none":
                quantize(bench.model, kind)
            lease.free()
            lease.number(f"weights_gib_{kind}_{name}", _allocated(lease) - before)
            lease.number(f"made_seconds_{kind}_{name}", time.perf_counter() - started)
            benches[kind] = bench
    steps = {"hificl": hificl_step, "mimic": mimic_step, "lora": lora_step}
    for method, made in steps.items():
        with lease.attempt(method):
            work = {kind: _attached(bench, made) for kind, bench in benches.items()}
            _compare(lease, work, f"{method}_step", name, 7)
    few, many = (2, 4) if lease.rehearses else (4, 36)
    for rows in (2,) if lease.rehearses else DECODED:
        with lease.attempt(f"decoding {rows} rows"):
            work = {kind: _decoded(_with_rows(bench, rows), few, many) for kind, bench in benches.items()}
            _compare(lease, work, f"{many - few}_tokens_B{rows}", name, 3)


def _compare(lease: Lease, work: dict[str, Callable[[], Any]], label: str, name: str, repeats: int) -> None:
    """Time the same work over each storage, in alternation, over that of weights as they are; and weigh it."""
    rounds = alternate(work, _repeats(lease, repeats), device=lease.device)
    for kind, run in work.items():
        lease.milliseconds(f"{label}_ms_{kind}_{name}", rounds.seconds[kind])
        if kind != "none" and "none" in work:
            lease.ratio(f"{label}_{kind}_over_none_{name}", rounds, kind, "none")
        if lease.device == "cuda":
            before = _allocated(lease)
            lease.number(f"{label}_beside_weights_gib_{kind}_{name}", peak(run) - before)


def _attached(bench: Bench, made: Callable[..., Any]) -> Callable[[], None]:
    train, adapter = made(bench)
    ids = bench.ids()

    def run() -> None:
        with attach(bench.model, adapter):
            train(ids, pixels=adapter.trains_vision)

    return run


def _decoded(bench: Bench, few: int, many: int) -> Callable[[], None]:
    """Return the decoding of so many tokens, most of which is not the prompt's pass."""
    return _generates(bench, many - few, adapters.create("hificl", bench.model))


def _allocated(lease: Lease) -> float:
    return torch.cuda.memory_allocated() / 2**30 if lease.device == "cuda" else 0.0


def visual(lease: Lease, name: str) -> None:
    """Time HiFICL's step with visual tokens at hand over the same step from pixels."""
    bench = lease.bench(name)
    rounds = reuse.times(bench, _repeats(lease, 7), lease.device)
    lease.ratio(f"with_over_without_{name}", rounds, "with", "without")
    lease.ratio(f"vision_share_{name}", rounds, "vision", "without")
    lease.number(f"visual_token_mib_{name}", bench.visual.nbytes / 2**20)


def one_token(lease: Lease) -> None:
    """Time one decoded token's attention over a cache of 1,024, over plain SDPA."""
    findings = Findings()
    sizes = replace(decode.SIZES[lease.device], attention_repeats=_repeats(lease, 15), other_repeats=_repeats(lease, 5))
    with torch.no_grad():
        decode.attention_of_a_token(findings, replace(sizes, cache=64) if lease.rehearses else sizes, lease.device)
    for name, value in findings.ratios.items():
        lease.number(name, value, findings.spread[name])


def layers(lease: Lease) -> None:
    """Time the decoder of Mistral-7B with adapters and with the published formulation, by length."""
    from benchmarks import attention

    lease.forget()
    sizes = attention.SIZES[lease.device]
    if lease.rehearses:
        sizes = replace(sizes, lengths=(16,), tokens=32, virtual_tokens=(2,), head_sizes=(32,), repeats=1)
    else:
        sizes = replace(sizes, repeats=5, tokens=2048, virtual_tokens=(8, 128), head_sizes=(64, 128))
    result = attention.run(lease.device, sizes=sizes)
    for name, value in result["ratios"].items():
        lease.number(name, value, result["spread"][name])
    for name, values in result["growth"].items():
        for key, value in values.items():
            lease.number(f"{name}_{key}", value)


def _repeats(lease: Lease, repeats: int) -> int:
    return 1 if lease.rehearses else repeats
