"""Attention as a GPU computes it, without one: CUDA's operators simulated, the Triton kernel interpreted, compiled."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from pipeline.attention import kernels
from pipeline.attention.reference import merge_attention_reference
from pipeline.attention.virtual import fused_differs, merge_attention, virtual_attention
from tests.support.simulated_cuda import NAME, simulated_gpu

GRID = list(
    itertools.product(
        (torch.bfloat16, torch.float32), (4, 2), ((1, 1), (5, 5), (33, 33), (1, 48), (5, 48)), (16, 12),
        (None, "left", "dead", "window"), ("full", "one"),
    )
)[::7]  # fmt: skip
BOUND = {torch.bfloat16: 0.1, torch.float32: 1e-4}


def drawn(kv_heads: int, queries: int, keys: int, size: int, dtype: torch.dtype, generator: torch.Generator):
    shapes = [(2, 4, queries, size), (2, kv_heads, keys, size), (2, kv_heads, keys, size), (4, 3, size), (4, 3, size)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype) for x in made[:3]] + made[3:]


def hiding(kind: str | None, queries: int, keys: int) -> torch.Tensor | None:
    if kind is None:
        return None
    mask = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    if kind == "left":
        mask[0, ..., : keys // 3] = False
    if kind == "dead":
        mask[0] = False
    if kind == "window":
        mask &= torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries - 2)
    return mask


def computed(attend, tensors, grad, mask, alpha):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = attend(*leaves, mask=mask, alpha=alpha)
    out.backward(grad.to(out.dtype))
    return [x.detach().cpu().double() for x in (out, *(leaf.grad for leaf in leaves))]


def test_cudas_operators_are_called_as_they_allow_and_give_the_equation():
    generator = torch.Generator().manual_seed(0)
    used = set()
    with simulated_gpu() as gpu:
        for dtype, kv_heads, (queries, keys), size, kind, alpha in GRID:
            case = f"{dtype} {kv_heads} key heads, {queries} of {keys}, {size}, {kind}, {alpha}"
            tensors, mask = drawn(kv_heads, queries, keys, size, dtype, generator), hiding(kind, queries, keys)
            grad = torch.randn(2, 4, queries, size, generator=generator).to(dtype)
            wanted = computed(merge_attention_reference, [x.double() for x in tensors], grad, mask, alpha)
            on_gpu = [x.to(NAME) for x in tensors]
            masked = None if mask is None else mask.to(NAME)
            gpu.reset()
            ours = computed(merge_attention, on_gpu, grad.to(NAME), masked, alpha)
            assert not [what for what in gpu.waits if "_to_copy" not in what], case  # but the results' way back
            used |= set(gpu.backends)
            with torch.no_grad():
                ours.append(merge_attention(*on_gpu, mask=masked, alpha=alpha).cpu().double())
            for x, y in zip(ours, [*wanted, wanted[0]], strict=True):
                assert (x - y).abs().max() <= BOUND[dtype] * (y.abs().max() + 1e-6), case
    assert used == {"flash", "flash backward", "efficient", "efficient with bias", "efficient backward"}


def test_neither_grouped_keys_nor_masks_are_copied_in_every_layer():
    generator = torch.Generator().manual_seed(0)
    q, k, v, keys, values = drawn(2, 33, 33, 16, torch.bfloat16, generator)
    copies = {str(kernels.aten.clone.default), str(kernels.aten.constant_pad_nd.default), "aten._to_copy.default"}
    with simulated_gpu() as gpu:
        q, k, v, keys, values = (x.to(NAME).requires_grad_() for x in (q, k, v, keys, values))

        def layer(mask):
            gpu.reset()
            virtual_attention(q, k, v, keys=keys, values=values, mask=mask).sum().backward()
            wide = [x for x in copies if gpu.operators[x]]
            return sum(gpu.operators[x] for x in wide)

        with_flash = layer(None)
        mask = kernels.prepare_mask(hiding("window", 33, 33).to(NAME), q.dtype)
        first, later = layer(mask), layer(mask)
        assert later < first
        with_groups = gpu.operators["aten.expand.default"]
        layer(None)
        assert gpu.operators["aten.expand.default"] < with_groups  # repeated for the efficient kernel alone
        assert with_flash <= later


def test_an_operator_with_another_signature_is_left_to_public_functions(monkeypatch):
    real = torch.ops.aten._scaled_dot_product_flash_attention
    schema = real.default._schema
    renamed = SimpleNamespace(arguments=[SimpleNamespace(name="moved"), *schema.arguments[1:]], returns=schema.returns)
    wider = SimpleNamespace(arguments=schema.arguments, returns=[*schema.returns, None])
    x = torch.empty(2, 4, 8, 16, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(kernels, "CUDA", "meta")
    operators = {name: getattr(torch.ops.aten, name) for names in kernels._SIGNATURES.values() for name in names}
    for changed, backend in ((schema, "flash"), (renamed, "efficient"), (wider, "efficient")):
        operators["_scaled_dot_product_flash_attention"] = SimpleNamespace(default=SimpleNamespace(_schema=changed))
        monkeypatch.setattr(kernels, "aten", SimpleNamespace(**operators))
        kernels._as_called.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            assert [kernels._backend(x, x, None) for _ in range(2)] == [backend] * 2
        assert len(said) == (backend != "flash")  # once
    monkeypatch.setattr(kernels, "aten", SimpleNamespace())
    kernels._as_called.cache_clear()
    with pytest.warns(UserWarning, match="no _scaled_dot_product_efficient_attention as it is called"):
        assert kernels._backend(x, x, None) == "plain"
    monkeypatch.undo()
    kernels._as_called.cache_clear()
    assert all(map(kernels._as_called, kernels._SIGNATURES))


def interpreted() -> None:
    """Run the Triton kernel in its interpreter against the equation; a process of its own, told by its environment."""
    from pipeline.attention import fused, virtual

    device = torch.device("cpu")
    assert fused_differs(fused, device, torch.bfloat16, tolerance=0.02) is None
    virtual.fused_on = lambda _: fused
    virtual.FUSED_ON = "cpu"
    virtual.softmax.MOST_TOKENS = 0
    generator = torch.Generator().manual_seed(0)
    cases = [  # key heads, queries, keys, size, mask, alpha, tokens by row, some of them hidden
        (4, 33, 33, 16, None, "full", False, False), (2, 5, 9, 24, "dead", "full", True, True),
        (2, 5, 9, 24, "dead", "one", False, True), (2, 1, 7, 16, "dead", "full", False, True),
        (4, 1, 7, 16, None, "one", True, False),
    ]  # fmt: skip
    for kv_heads, queries, keys, size, kind, alpha, per_row, hidden in cases:
        tensors, mask = drawn(kv_heads, queries, keys, size, torch.float32, generator), hiding(kind, queries, keys)
        if per_row:
            tensors[3:] = [torch.randn(2, 4, 3, size, generator=generator) for _ in range(2)]
        seen = torch.tensor([[[True, False, True]], [[False, False, False]]]) if hidden else None
        grad = torch.randn(2, 4, queries, size, generator=generator)
        made = [
            computed(partial(f, virtual_mask=seen), given, grad, mask, alpha)
            for f, given in ((merge_attention, tensors), (merge_attention_reference, [x.double() for x in tensors]))
        ]
        with torch.no_grad():
            made[0].append(merge_attention(*tensors, mask=mask, alpha=alpha, virtual_mask=seen).double())
        for x, y in zip(made[0], [*made[1], made[1][0]], strict=True):
            assert (x - y).abs().max() <= 2e-5 * (y.abs().max() + 1), (
                queries,
                keys,
                size,
                kind,
                alpha,
                per_row,
                hidden,
            )
    by_row = torch.tensor([True, False])
    q, k, v, keys, values = drawn(2, 5, 5, 16, torch.float32, generator)
    bias = torch.randn(4, 1, 3, generator=generator)
    outs = []
    for replaces in (by_row, True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, keys, bias, values)]
        named = dict(zip(("keys", "bias", "values"), leaves[3:], strict=True))
        out = virtual_attention(*leaves[:3], **named, replaces=replaces)
        out.square().sum().backward()
        outs.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for mixed, first, second in list(zip(*outs, strict=True))[:4]:  # each row as it is in a pack of its own kind
        torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))


def test_the_triton_kernel_gives_the_equation_in_its_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", f"from {__name__} import interpreted; interpreted()"]
    pytest.importorskip("triton")
    subprocess.run(command, env=environment, check=True)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_triton_kernel_compiles_for_every_card(architecture, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.attention import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    low = {"q", "context", "out", "saved", "grad", "dq"}
    for kernel in (fused._forward_kernel, fused._backward_kernel):
        constants = {"ROWS": 32, "COLUMNS": 128}
        kinds = {"takes": "*i32", "scale": "fp32"}
        for name in kernel.arg_names:
            whole = name in (*fused._PLAIN, "size") or name.rpartition("_")[2] in ("b", "h", "t")
            pointer = "*bf16" if name in low else "*fp32"
            kinds.setdefault(name, "constexpr" if name in constants else "i32" if whole else pointer)
        given = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if kinds[name][0] in "*i" and name not in fused._PLAIN
        }
        source = ASTSource(fn=kernel, signature=kinds, constexprs=given, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
        assert made.asm["cubin"][:4] == b"\x7fELF"
        assert f".target sm_{architecture}" in made.asm["ptx"]
