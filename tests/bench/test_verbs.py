"""Every verb runs in a tiny size and gives the contract's names; no assertion is about time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import attention, decode, evaluate, exits, overhead, pack, reuse, scale, serve, step
from benchmarks.support.published import Published, published_attention
from benchmarks.support.shapes import CPU, LEASE, DecoderShape, Workload, decoder
from benchmarks.support.steps import Trained
from benchmarks.support.timing import Rounds, alternate, report, saved_bytes
from pipeline.attention.virtual import merge_attention
from pipeline.backbones.decoder import decoder_of

TINY = DecoderShape(32, 48, 2, 4, 2, 64)


def tiny(name: str) -> Workload:
    return LEASE["cpu"][name]


def check(result: dict[str, Any], names: list[str]) -> None:
    assert {"ratios", "spread", "sizes", "machine", "versions", "method"} <= result.keys()
    assert result["machine"]["threads"] >= 1
    assert set(names) <= result["ratios"].keys()
    assert result["ratios"].keys() == result["spread"].keys()
    for name, value in result["ratios"].items():
        assert value > 0 and math.isfinite(value), name
        low, high = result["spread"][name]
        assert low <= high
    json.dumps(result, default=str)


def test_attention() -> None:
    sizes = attention.Sizes(TINY, lengths=(8, 16), tokens=16, virtual_tokens=(2,), head_sizes=(8,), repeats=2)
    names = [
        f"{label}_T{length}"
        for length in (8, 16)
        for label in (
            "step_over_floor", "mimic_step_over_floor", "published_over_ours_time", "published_over_ours_saved",
        )
    ]  # fmt: skip
    check(attention.run(sizes=sizes), names)


def test_the_lengths_of_the_contract_are_measured() -> None:
    assert all(set(sizes.lengths) == {128, 512, 1024} for sizes in attention.SIZES.values())
    assert {(sizes.cache, sizes.batch) for sizes in decode.SIZES.values()} == {(1024, 8)}


@pytest.mark.parametrize("name", sorted(CPU))
def test_step(name: str) -> None:
    result = step.run(workloads={name: tiny(name)}, repeats=1)
    labels = (
        "step_over_floor", "mimic_step_over_floor", "mimic_over_hificl", "lora_over_hificl",
        "packed_over_sequential_K8",
    )  # fmt: skip
    check(result, [f"{label}_{name}" for label in labels])
    assert result["left_out"] == []
    assert result["counted"][name]["flops_a_second"]["floor"] > 0


def test_decode() -> None:
    sizes = decode.Sizes(
        TINY, cache=16, batch=2, attention_repeats=1, other_repeats=1, new_tokens=2, generate_repeats=1, shots=(1,)
    )
    names = ["decode_over_sdpa_S16_B2", "generate_over_zero_shot", "icl_1_over_adapter"]
    check(decode.run(sizes=sizes, workloads={"idefics2": tiny("idefics2")}), names)


def test_reuse() -> None:
    workloads = {name: tiny(name) for name in CPU}
    result = reuse.run(
        workloads=workloads, repeats=1, teacher={"num_trials": 2, "num_samples": 12, "repeats": 1}, images=(8,)
    )
    names = ["with_over_without_idefics2", "with_over_without_llava", "images_compute_ms_8", "images_disk_ms_8"]
    check(result, names)


def test_evaluate() -> None:
    sizes = evaluate.Sizes(
        answers=20, captions=12, prompts=4, batch_size=2, new_tokens=2, split=6, split_batch_size=3, repeats=1
    )
    names = ["vqa_seconds_20", "cider_seconds_12", "chair_seconds_12", "batched_over_single_seconds"]
    names += ["head_instruction_once_over_whole_seconds", "head_demonstrations_once_over_copied_seconds"]
    check(evaluate.run(sizes=sizes), names)


def test_the_published_formulation_is_equation_1_where_it_is_masked() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    learned = [torch.randn(4, 3, 8, dtype=torch.float64) for _ in range(2)]
    published = published_attention(q, k, v, *learned, scale=8**-0.5, causal=True)
    torch.testing.assert_close(published, merge_attention(q, k, v, *learned), rtol=1e-12, atol=1e-12)


def test_the_published_formulation_leaves_the_model_as_it_was() -> None:
    model: Any = decoder(TINY, device="cpu", dtype=torch.float32)
    ids = torch.randint(1, 60, (1, 6))
    before = model(ids).logits
    with Published(decoder_of(model)):
        changed = model(ids).logits
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_saved_bytes_counts_each_storage_once_and_no_weights() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4, requires_grad=True)
    hidden = layer(x)
    assert saved_bytes(lambda: layer(x), layer) == x.nbytes
    assert saved_bytes(lambda: hidden * hidden, layer) == hidden.nbytes


def test_alternation_turns_the_order_and_pairs_the_rounds() -> None:
    order: list[str] = []
    rounds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, warmup=0)
    assert order == ["a", "b", "b", "a"]
    assert [len(seconds) for seconds in rounds.seconds.values()] == [2, 2]
    paired = Rounds({"a": [1.0, 9.0, 4.0], "b": [1.0, 3.0, 1.0]})
    assert paired.ratio("a", "b") == 3.0
    assert paired.spread("a", "b") == [2.0, 3.5]


def test_a_step_of_all_logits_is_the_same_loss() -> None:
    from benchmarks.support.shapes import Bench

    bench = Bench(tiny("idefics2"), "cpu")
    ids = bench.ids()
    weight = [torch.nn.Parameter(torch.zeros(1))]
    hidden = bench.hidden(bench.inputs(ids))
    values = [Trained(bench, weight, whole_logits=whole).truth(hidden, ids) for whole in (False, True)]
    torch.testing.assert_close(*values)


def test_visual_tokens_at_hand_and_pixels_give_the_same_hidden_states() -> None:
    from benchmarks.support.shapes import Bench

    for name in CPU:
        bench = Bench(tiny(name), "cpu")
        ids = bench.ids()
        with torch.no_grad():
            kept, seen = (bench.hidden(bench.inputs(ids, pixels=pixels)) for pixels in (False, True))
        torch.testing.assert_close(kept, seen)


def test_report_names_method_and_threads() -> None:
    from benchmarks.support.timing import Findings

    result = report(
        Findings({"x": 1.0}, {"x": [1.0, 1.0]}), device="cpu", method="One line.\n\nArgs:\n  a: b", sizes={}
    )
    assert result["method"] == "One line."


def test_the_verbs_for_a_gpu_box_import_torch_and_transformers_alone() -> None:
    """Whatever else may be installed is hidden: beside torch and transformers they need pydantic alone."""
    code = (
        "import sys, torch, transformers, transformers.models.mistral.modeling_mistral, safetensors.torch\n"
        "for name in ('PIL', 'peft', 'deepspeed', 'ray', 'mlflow', 'dvc', 'nltk', 'pycocoevalcap'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks import attention, decode, reuse, step\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exits() -> None:
    result = exits.run(seeds=2, num_samples=16, epochs=3, num_evaluation=4)
    ratios = result["ratios"]
    for rule, (after, keep) in exits.RULES.items():
        assert 0 < ratios[f"{rule}_samples"] < 1 and ratios[f"{rule}_rank"] >= 1
        assert 0 <= ratios[f"{rule}_regret"] <= 100 and 0 <= ratios[f"{rule}_within_a_point"] <= 1
        left, share = 8, 0.0
        for before, point in zip((0.0, *after), (*after, 3.0), strict=True):
            share += left * (point - before) / (8 * 3)
            left = -int(-left * keep // 1)
        assert ratios[f"{rule}_samples"] == pytest.approx(share)
    assert ratios["best_score_of_the_grid"] >= ratios["mean_score_of_the_grid"]
    json.dumps(result, default=str)


def test_pack() -> None:
    result = pack.run(num_trials=(2,), num_samples=8, repeats=1, curve_trials=(2, 4), widths=(32,))
    assert {name: sorted(points) for name, points in result["growth"].items()} == {
        f"packed_over_sequential_D32T{tokens}": ["2", "4"] if tokens < 1024 else ["2"] for tokens in (16, 64, 256, 1024)
    }
    assert {"packed_over_sequential_K2", "packed_over_sequential_K2_papers_step"} <= result["ratios"].keys()
    assert result["ratios"]["loss_difference_fp32"] == 0 and result["ratios"]["loss_difference_fp64"] <= 1e-8
    assert result["ratios"]["packed_equals_solo"] == 1


def test_serve() -> None:
    sizes = serve.Sizes(rows=4, prompt=6, new_tokens=2, repeats=1)
    names = ["mixed_adapters_over_one", "mixed_methods_over_one", "mixed_lora_over_one", "mixed_lora_ms_a_token_one"]
    check(serve.run(sizes=sizes, workload=tiny("idefics2")), names)


@pytest.mark.long
def test_overhead() -> None:
    result = overhead.run(
        ranks=(1, 2), num_virtual_tokens=(2,), learning_rates=(0.005, 0.01), num_train_samples=16, noop_repeats=1
    )
    ratios, seconds = result["ratios"], result["seconds"]
    assert ratios["sweep_over_bare_loops"] > 0 and ratios["noop_repro_seconds"] > 0
    assert 0 < ratios["first_step_seconds"] < seconds["sweep_of_two"]
    assert ratios["two_trials_over_bare_loops"] == seconds["sweep_of_two"] / seconds["bare_loops_of_two"]


@pytest.mark.long
def test_scale() -> None:
    result = scale.run(num_trials=60, nodes=4, tune_trials=(4,), measured_runs=4, other_nodes=(2,))
    names = ["decision_ms", "dispatcher_ms_per_trial", "driver_mib", "ledger_kib_per_trial", "sqlite_trial_ms_full",
             "sqlite_kib_per_trial", "sqlite_resume_seconds", "tune_ms_per_trial_4",
             "dispatcher_ms_per_trial_nodes_2"]  # fmt: skip
    check(result, names)
