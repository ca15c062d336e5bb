"""Whole training steps of every method on real architectures: `hificl bench step`.

python -m benchmarks.step --device cuda      # full-size random Idefics2-8b and LLaVA-Interleave-7b in bf16
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.support.shapes import WORKLOADS, Bench, Workload
from benchmarks.support.steps import Trained, floor_step, hificl_step, lora_step, mimic_step, packed_steps, teach
from benchmarks.support.timing import Findings, Rounds, alternate, main, one_thread, report
from pipeline import backbones
from pipeline.adapters.attach import attach
from pipeline.backbones.decoder import compiled_parts
from pipeline.cost.flops import Costs, Prompt

# dense bf16 FLOP/s by a part of the GPU's name, for the utilisation; unknown GPUs get none
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
LORA_RANK = 16
PACKED = 8
RATIOS = (  # label, step, what it is compared with
    ("step_over_floor", "hificl", "floor"),
    ("mimic_step_over_floor", "mimic", "floor"),
    ("mimic_over_hificl", "mimic_taught", "hificl"),
    ("mimic_as_published_over_hificl", "mimic_published", "hificl_pixels"),
    ("lora_over_hificl", "lora", "hificl"),
    ("lora_over_hificl_from_pixels", "lora", "hificl_pixels"),
    ("all_logits_over_answer_logits", "hificl_all_logits", "hificl"),
)


def run(
    device: str = "cpu",
    *,
    workloads: Mapping[str, Workload] | None = None,
    repeats: int = 7,
    compiled: bool | None = None,
) -> dict[str, Any]:
    """Time one training step of each method on random models of the real architectures.

    The floor is the frozen decoder alone: forward, and backward to its input embeddings. A step is forward, loss at the
    answer, backward, clip and AdamW. HiFICL and MimIC have visual tokens at hand, LoRA starts from pixels because it
    trains the vision tower. MimIC's student is given its teacher's states; `mimic_over_hificl` adds the teacher's pass
    over the demonstrations, with visual tokens at hand, and `mimic_as_published_over_hificl` runs the vision tower for
    every image in both, as the published code does. `all_logits` computes logits at every position,
    `packed_over_sequential_K8` has eight HiFICL trials in one pass and one after another, in samples per second, and
    `compiled_parts_over_eager` is what `train.compile` brings. FLOPs are counted by formula (pipeline.cost). On a CPU
    everything runs on one thread.

    Args:
        device: cpu or cuda.
        workloads: what is measured; None: the device's own.
        repeats: rounds.
        compiled: whether HiFICL and the floor are also measured under torch.compile; None: on CUDA.
    """
    findings, counted, left_out = Findings(), {}, []
    chosen = workloads or WORKLOADS[device]
    with one_thread(device):
        for name, workload in chosen.items():
            bench = Bench(workload, device)
            work, skipped = callables(bench)
            left_out += [f"{name}: {text}" for text in skipped]
            rounds = alternate(work, repeats, device=device)
            for label, of, over in RATIOS:
                if of in rounds.seconds:
                    findings.add(f"{label}_{name}", rounds, of, over)
            findings.seconds(f"floor_seconds_{name}", rounds, "floor")
            together, alone = packed_steps(bench, PACKED)
            packs = alternate({"together": together, "alone": alone}, repeats, device=device)
            findings.add(f"packed_over_sequential_K{PACKED}_{name}", packs, "alone", "together")
            counted[name] = count(bench, rounds, device)
            if device == "cuda":
                counted[name]["peak_gib"] = {label: peak(run_once) for label, run_once in work.items()}
            if compiled if compiled is not None else device == "cuda":
                left_out += _compiled(findings, bench, name, repeats, device)
                _compiled_parts(findings, bench, name, repeats, device)
            del bench, work
    sizes = {"repeats": repeats, **{name: asdict(workload) for name, workload in chosen.items()}}
    return report(findings, device=device, method=run.__doc__, sizes=sizes, counted=counted, left_out=left_out)


def callables(bench: Bench) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """Return the floor and the steps of every method by name, and what is missing and why."""
    ids, demonstrated = bench.ids(), bench.ids(bench.workload.shots)
    hificl, virtual = hificl_step(bench)
    whole = Trained(bench, list(virtual.parameters()), whole_logits=True)
    mimic, shift = mimic_step(bench)

    def attached(adapter: Any, step: Callable[..., None], **arguments: Any) -> Callable[[], None]:
        def work() -> None:
            with attach(bench.model, adapter):
                step(ids, **arguments)

        return work

    def taught(pixels: bool) -> Callable[[], None]:
        def work() -> None:
            targets = teach(bench, demonstrated, ids.shape[1], pixels=pixels)
            with attach(bench.model, shift):
                mimic(ids, pixels=pixels, targets=targets)

        return work

    work = {
        "floor": floor_step(bench),
        "hificl": attached(virtual, hificl),
        "hificl_pixels": attached(virtual, hificl, pixels=True),
        "hificl_all_logits": attached(virtual, whole),
        "mimic": attached(shift, mimic),
        "mimic_taught": taught(pixels=False),
        "mimic_published": taught(pixels=True),
    }
    if importlib.util.find_spec("peft") is None:
        return work, ["LoRA was not measured: peft is not installed"]
    lora, update = lora_step(bench, rank=LORA_RANK)
    return {**work, "lora": attached(update, lora, pixels=True)}, []


def count(bench: Bench, rounds: Rounds, device: str) -> dict[str, Any]:
    """Return FLOPs of a sample by step, and the rates and the share of the GPU's peak that the times give."""
    work = bench.workload
    height, width = work.pixels["pixel_values"][-2:]
    costs = Costs(
        backbones.get(work.backbone), bench.model, Prompt(work.text_tokens, work.answer_tokens),
        (height, width),
    )  # fmt: skip
    steps = {
        method: costs.step(method, options, shots=work.shots)
        for method, options in (("hificl", {}), ("mimic", {}), ("lora", {"rank": LORA_RANK}))
    }
    flops = {
        "floor": costs.floor(), "hificl": steps["hificl"].reused, "hificl_pixels": steps["hificl"].whole,
        "mimic_taught": steps["mimic"].reused,
        "mimic_published": steps["mimic"].whole, "lora": steps["lora"].whole,
    }  # fmt: skip
    rates = {
        label: value * work.batch / rounds.median(label) for label, value in flops.items() if label in rounds.seconds
    }
    counted: dict[str, Any] = {"flops_a_sample": flops, "flops_a_second": rates}
    if device == "cuda":
        peak = next((value for part, value in PEAK.items() if part in torch.cuda.get_device_name(0)), None)
        counted["utilisation"] = {label: rate / peak for label, rate in rates.items()} if peak else None
    return counted


def _attached_hificl(bench: Bench) -> Callable[[], None]:
    step, adapter = hificl_step(bench)
    ids = bench.ids()

    def hificl() -> None:
        with attach(bench.model, adapter):
            step(ids)

    return hificl


def _compiled(findings: Findings, bench: Bench, name: str, repeats: int, device: str) -> list[str]:
    """Measure HiFICL and the floor with the decoder's layers under torch.compile; say so where that fails."""
    plain = [layer.forward for layer in bench.spec.layers]
    try:
        for layer in bench.spec.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        # two warm-up rounds: the first compiles, and guards settle in the second
        work = {"floor": floor_step(bench), "hificl": _attached_hificl(bench)}
        rounds = alternate(work, repeats, warmup=2, device=device)
    except Exception as error:  # whatever the compiler meets is a finding, not a failure of the verb
        return [f"{name}: compiled steps were not measured: {type(error).__name__}: {str(error)[:200]}"]
    finally:
        for layer, forward in zip(bench.spec.layers, plain, strict=True):
            layer.forward = forward
        torch._dynamo.reset()
    findings.add(f"compiled_step_over_floor_{name}", rounds, "hificl", "floor")
    findings.seconds(f"compiled_floor_seconds_{name}", rounds, "floor")
    return []


def _compiled_parts(findings: Findings, bench: Bench, name: str, repeats: int, device: str) -> None:
    """Measure what `train.compile` brings: HiFICL's step with the decoder's frozen parts compiled, and without."""
    eager, forwards = _attached_hificl(bench), dict[torch.nn.Module, Callable[..., Any]]()

    def parts() -> None:
        with compiled_parts(bench.model, forwards):
            eager()

    rounds = alternate({"eager": eager, "parts": parts}, repeats, warmup=2, device=device)
    findings.add(f"compiled_parts_over_eager_{name}", rounds, "parts", "eager")


def peak(work: Callable[[], Any]) -> float:
    """Return the GiB of GPU memory that are allocated at most while `work` runs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    main(run)
