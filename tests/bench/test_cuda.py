"""`hificl bench cuda` as a rehearsal on the CPU: numbers that are right, failures that are named, time that is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks
from benchmarks import cuda
from benchmarks.cuda import ITEMS, Item
from benchmarks.support import exact, lease
from benchmarks.support.lease import Lease, work
from pipeline.attention import kernels
from pipeline.core.errors import InputError
from tests.conftest import ROOT

BARE = ("peft", "deepspeed", "ray", "mlflow", "dvc", "nltk", "pycocoevalcap", "sqlalchemy", "aiohttp")


def rehearse(folder: Path, *names: str) -> dict[str, Any]:
    """Go through items in this process and return their summary."""
    lines = folder / cuda.LINES
    lines.write_text("", encoding="utf-8")
    work(Lease("cpu", lines), [item for item in ITEMS if item.name in names])
    return cuda.summary(cuda.read(lines), minutes=1, items=names)


def own(monkeypatch: pytest.MonkeyPatch, function: Any, name: str = "own", seconds: float = 0.0) -> Item:
    """Return an item that runs a function of the test."""
    monkeypatch.setattr(lease, f"_{name}", function, raising=False)
    return Item(name, seconds, f"lease:_{name}")


def test_attention_is_right_and_a_wrong_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = rehearse(tmp_path, "exact-attention")
    assert len(result["ratios"]) == result["checked"] == 10 and result["wrong"] == result["failed"] == []
    backward = kernels._BACKWARD["cpu"]

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = backward(*arguments)
        return dq, dk * 1.001, dv

    monkeypatch.setitem(kernels._BACKWARD, "cpu", wrong)
    result = rehearse(tmp_path, "exact-attention")
    found = {row["name"]: row for row in result["wrong"]}
    assert "attention_float32_left" in found and "gradient 1" in found["attention_float32_left"]["worst"]


def test_every_form_and_mask_of_the_grid_hides_and_shifts_something() -> None:
    grid = [case for mask in exact.MASKS for case in exact.cases("float32", mask)]
    assert {case.form for case in grid} == set(exact.FORMS) and {case.size % 8 for case in grid} == {0, 4}
    for case in (exact.Case("float32", mask, "full", queries=9, keys=17) for mask in exact.MASKS[1:]):
        mask, _, _ = exact._inputs(case)
        assert mask is not None
        plain = kernels.causal_mask(9, 17, torch.device("cpu"))
        hides = mask if mask.dtype == torch.bool else mask == 0
        assert not torch.equal(hides, plain.expand_as(hides))


def test_a_step_of_every_method_and_a_pack(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "exact-idefics2-8b-base")
    assert result["failed"] == result["wrong"] == []
    assert {f"step_bfloat16_{method}_idefics2-8b-base" for method in exact.METHODS} <= result["ratios"].keys()
    assert 0 < result["ratios"]["step_float32_mimic_idefics2-8b-base"] < 1e-4
    assert result["ratios"]["pack_over_alone_idefics2-8b-base"] < 1e-4


@pytest.mark.long
def test_ratios_of_random_models(tmp_path: Path) -> None:
    name = "idefics2"
    items = [f"{item}-{name}" for item in ("step", "packs", "decode", "reuse")]
    result = rehearse(tmp_path, "ceilings", "attention-of-a-token", *items)
    assert result["failed"] == []
    names = (
        "step_over_floor", "mimic_over_hificl", "lora_over_hificl", "packed_over_sequential_K2", "with_over_without",
        "decoded_token_over_plain_B2", "weight_read_over_decoded_token_adapter_B2", "floor_teraflops",
    )  # fmt: skip
    assert {f"{label}_{name}" for label in names} <= result["ratios"].keys()
    assert all(value > 0 for value in result["ratios"].values())


@pytest.mark.long
def test_cached_decoding_and_a_layers_growth(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "exact-decoding", "layers")
    assert result["failed"] == result["wrong"] == [] and result["checked"] == 6
    assert "step_over_floor_T16" in result["ratios"]


@pytest.mark.long
def test_weights_in_few_bits_are_exact_and_measured(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "exact-quantized", "quantized-idefics2")
    assert result["failed"] == result["wrong"] == [] and result["checked"] == 2 * 2 * len(exact.METHODS) + 2
    assert 0 < result["ratios"]["quantized_nf4_float32_lora"] < 1e-5
    assert result["ratios"]["hificl_step_nf4_over_none_idefics2"] > 0
    assert result["ratios"]["2_tokens_B2_ms_int8_idefics2"] > 0


def test_a_failure_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(given: Lease) -> None:
        given.number("before", 1.0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    items = [
        own(monkeypatch, fails, "fails"),
        own(monkeypatch, lambda given: given.number("later", 2.0), "later"),
        own(monkeypatch, lambda given: given.number("long", 3.0), "long", seconds=50),
    ]
    lines = tmp_path / "lines"
    given = Lease("cpu", lines, time.time() + 30)
    monkeypatch.setattr(Lease, "rehearses", False)
    work(given, items)
    result = cuda.summary(cuda.read(lines), minutes=1, items=["fails", "later", "long", "never"])
    assert result["ratios"] == {"before": 1.0, "later": 2.0} and result["skipped"] == ["long", "never"]
    assert result["failed"] == ["fails : OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"]
    (failure,) = [entry for entry in cuda.read(lines) if "failed" in entry]
    assert failure["traceback"][-1].endswith("Tried to allocate 2 GiB")


def test_what_a_failed_item_held_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    held: list[weakref.ref[Tensor]] = []

    def fails(given: Lease) -> None:
        tensor = torch.ones(8)
        held.append(weakref.ref(tensor))
        raise ValueError("with a tensor in its frame")

    work(Lease("cpu", tmp_path / "lines"), [own(monkeypatch, fails)])
    assert held[0]() is None


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is real; the items are those of a module beside it."""
    module = tmp_path / "benchmarks_of_a_test.py"
    module.write_text(
        "import os, time\n"
        "def dies(lease): os.kill(os.getpid(), 11)\n"
        "def hangs(lease): time.sleep(600)\n"
        "def works(lease): lease.number('one', 1.0)\n",
        encoding="utf-8",
    )
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, benchmarks.cuda as cuda\n"
        "import benchmarks_of_a_test as own\n"
        "sys.modules['benchmarks.support.own'] = own\n"
        "cuda.ITEMS = tuple(cuda.Item(name, 0, f'own:{name}') for name in ('dies', 'hangs', 'works'))\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr(cuda, "_START", 0.0)
    items = tuple(Item(name, 0, f"own:{name}") for name in ("dies", "hangs", "works"))
    monkeypatch.setattr(cuda, "ITEMS", items)
    monkeypatch.setattr(Item, "limit", 2.0)
    result = cuda.run("cpu", minutes=5, out=tmp_path)
    assert result["ratios"] == {"one": 1.0} and result["skipped"] == []
    assert result["failed"] == ["dies : its process ended with status -11", "hangs : stopped after 2 s"]


def test_what_is_given_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exact-attention"):
        cuda.run("cpu", items=["exact-atention"], out=tmp_path)
    with pytest.raises(InputError, match="positive"):
        cuda.run("cpu", minutes=0, out=tmp_path)
    with pytest.raises(InputError, match="bench step takes no --minutes"):
        benchmarks.run("step", minutes=3.0)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU that works"):
            benchmarks.run("cuda", minutes=1.0, out=tmp_path)


@pytest.mark.long
def test_a_bare_machine_is_enough(tmp_path: Path) -> None:
    """From the repository's root, as a program, with the other packages hidden; JSON alone on standard output."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in {BARE}:\n    sys.modules[name] = None\n", encoding="utf-8"
    )
    names = ["exact-decoding", "whole-trials", "step-llava"]
    command = ["-m", "benchmarks.cuda", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path), "--items", *names]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "cuda-cpu.json").read_text(encoding="utf-8")) == result
    assert [text.split(":")[0] for text in result["failed"]] == ["whole-trials lora"], result["failed"]
    assert result["wrong"] == result["skipped"] == []
    assert {"whole_trial_pack", "mimic_over_hificl_llava"} <= result["ratios"].keys()
    (tmp_path / "tables").mkdir()
    (tmp_path / "cuda-cpu.json").rename(tmp_path / "tables" / "cuda-cpu.json")
    assert "| cached_over_whole_bfloat16_hificl |" in benchmarks.table(tmp_path / "tables")
