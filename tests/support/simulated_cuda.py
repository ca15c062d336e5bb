"""A CUDA device that does not exist: tensors report a GPU, live on the CPU, and refuse to meet tensors of the CPU.

It counts what a GPU makes slow: waits for the device by the line that causes them, copies from the host, operators. Its
attention operators are CUDA's, with their preconditions. What it cannot show is any number of a real GPU.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.attention import kernels

aten = torch.ops.aten
NAME = "simulated"


class DeviceMix(RuntimeError):
    """A tensor of the CPU met one of the GPU."""


class _OnGpu(Tensor):
    """Says that it is on the GPU; `held` is its content."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return SimulatedGpu.active.run(operator, args, kwargs or {})

    def tolist(self):
        SimulatedGpu.active.waits["tolist at " + _place()] += 1
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of the GPU to numpy")

    def __repr__(self):
        return f"on the GPU: {tuple(self.shape)} {self.dtype}"

    def __deepcopy__(self, memo):
        return _OnGpu(self.held.clone())


# operators whose result's size or value the host must know
_WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten.unique_dim.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
_INDEXES = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip
_MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.lift_fresh.default, *_INDEXES}


def _mapped(change: Callable, x):
    """Change what stands in lists, tuples and mappings, as operators take and give them; pytree is much slower."""
    if type(x) in (list, tuple):
        return type(x)([_mapped(change, one) for one in x])
    return {name: _mapped(change, one) for name, one in x.items()} if type(x) is dict else change(x)


_name = cache(str)  # of an operator


class SimulatedGpu(TorchDispatchMode):
    """What has happened on the device.

    Attributes:
        waits: by what the host waited for and the line that asked.
        copies: from the host, by line.
        operators: by name.
        backends: the attention operators that ran.
    """

    active: SimulatedGpu

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.copies, self.operators, self.backends = (Counter() for _ in range(4))

    def reset(self) -> None:
        """Count from zero."""
        for counter in (self.waits, self.copies, self.operators, self.backends):
            counter.clear()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return self.run(operator, args, kwargs or {})

    def run(self, operator, args, kwargs):
        """Count one operator, refuse what CUDA refuses, and compute it on the CPU."""
        leaves: list = []
        _mapped(leaves.append, [args, kwargs])
        ours = [x for x in leaves if isinstance(x, _OnGpu)]
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == NAME
        if not ours and not to_gpu:
            return operator(*args, **kwargs)
        self.operators[_name(operator)] += 1
        self._count(operator, args, kwargs, to_gpu)
        if ours and operator not in _MAY_MIX:
            mixed = [tuple(x.shape) for x in leaves if isinstance(x, Tensor) and not isinstance(x, _OnGpu) and x.dim()]
            if mixed:
                raise DeviceMix(f"{operator}: {mixed} on the CPU meets the GPU at {_place()}")
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        held_args, held_kwargs = _mapped(lambda x: x.held if isinstance(x, _OnGpu) else x, [args, kwargs])
        if operator in _EMULATED:
            result = _EMULATED[operator](self, *held_args, **held_kwargs)
        else:
            result = operator(*held_args, **held_kwargs)
        leaves_gpu = not to_gpu and operator is aten._to_copy.default and torch.device(device or NAME).type == "cpu"
        if operator is aten._local_scalar_dense.default or leaves_gpu or not (ours or to_gpu):
            return result
        if operator is aten.copy_.default and not isinstance(args[0], _OnGpu):
            return args[0]
        if operator is aten._to_copy.default and result is held_args[0]:
            result = result.clone()
        known = {id(x.held): x for x in ours}
        wrap = lambda x: known.get(id(x)) or _OnGpu(x) if isinstance(x, Tensor) else x  # noqa: E731
        return _mapped(lambda x: known[id(x)] if id(x) in known else wrap(x), result)

    def _count(self, operator, args, kwargs, to_gpu: bool) -> None:
        waits = operator in _WAITS
        if operator is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
            waits = False
        if operator is aten._to_copy.default:
            source, device = args[0], kwargs.get("device")
            if to_gpu and not isinstance(source, _OnGpu):
                self.copies[_place()] += 1
                waits = not kwargs.get("non_blocking")
            elif isinstance(source, _OnGpu) and device is not None and torch.device(device).type == "cpu":
                waits = True
        elif operator is aten.copy_.default:
            into, source = args[0], args[1]
            if isinstance(into, _OnGpu) and not isinstance(source, _OnGpu):
                self.copies[_place()] += 1
            later = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            waits = not isinstance(into, _OnGpu) and isinstance(source, _OnGpu) and not later
        elif operator in _INDEXES:
            self._count_index(operator, args)
        if waits:
            self.waits[f"{operator} at {_place()}"] += 1

    def _count_index(self, operator, args) -> None:
        if not isinstance(args[0], _OnGpu):
            raise DeviceMix(f"{operator}: a tensor of the CPU is indexed by one of the GPU at {_place()}")
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.waits[f"index by bool at {_place()}"] += 1
            elif index is not None and index.dim() and not isinstance(index, _OnGpu):
                self.waits[f"index from the CPU at {_place()}"] += 1
        if len(args) > 2 and isinstance(args[2], Tensor) and args[2].dim() and not isinstance(args[2], _OnGpu):
            raise DeviceMix(f"{operator}: a value of the CPU at {_place()}")


def _place() -> str:
    """Return the line that asked: the innermost of ours, of transformers' or of torch's optimisers."""
    ours = other = ""
    frame = sys._getframe()
    while frame := frame.f_back:
        name = frame.f_code.co_filename
        for part in ("/pipeline/", "/transformers/", "/torch/optim/", "/torch/nn/utils/", "/peft/"):
            if part in name:
                text = part.strip("/") + "/" + name.split(part)[-1] + f":{frame.f_lineno}"
                ours, other = (ours or text, other) if part == "/pipeline/" else (ours, other or text)
        if ours:
            break
    return " < ".join(text for text in (other, ours) if text) or "?"


# ---------------------------------------------------------------------------- CUDA's attention, with its preconditions


def _need(fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise RuntimeError(f"CUDA's kernel would refuse: {what}")


def _scores(q, k, bias, causal, scale):
    scores = q.float() @ _heads(k, q).float().mT * (scale if scale is not None else q.shape[-1] ** -0.5)
    if causal:  # aligned to the upper left
        scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -math.inf)
    return scores if bias is None else scores + bias.float()


def _heads(k, q):
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _forward(q, k, v, bias, causal, scale):
    scores = _scores(q, k, bias, causal, scale)
    lse = torch.logsumexp(scores, -1)
    out = ((scores - lse.unsqueeze(-1)).exp() @ _heads(v, q).float()).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()  # the kernels' layout, [B, T, H, d]


def _backward(grad, q, k, v, out, lse, bias, causal, scale):
    factor = scale if scale is not None else q.shape[-1] ** -0.5
    p = (_scores(q, k, bias, causal, scale) - lse.unsqueeze(-1)).exp()
    grad = grad.float()
    d_scores = p * (grad @ _heads(v, q).float().mT - (grad * out.float()).sum(-1, keepdim=True)) * factor
    dk, dv = d_scores.mT @ q.float(), p.mT @ grad
    groups = (q.shape[1] // k.shape[1],)
    dk, dv = (x.unflatten(1, (-1, *groups)).sum(2) for x in (dk, dv))
    return (d_scores @ _heads(k, q).float()).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _flash(gpu, q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    gpu.backends["flash"] += 1
    for x in (q, k, v):
        _need(x.dtype in (torch.float16, torch.bfloat16), f"flash in {x.dtype}")
        _need(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256, f"flash with heads of {x.shape[-1]}")
    seed, offset = torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    out, lse = _forward(q, k, v, None, causal, scale)
    return out, lse, None, None, q.shape[2], k.shape[2], seed, offset, torch.empty(0, dtype=q.dtype)


def _flash_backward(gpu, grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale):
    gpu.backends["flash backward"] += 1
    for x in (grad, q, k, v, out):
        _need(x.dtype == q.dtype and x.stride(-1) == 1, f"flash backward of {x.dtype} {x.stride()}")
    _need(lse.dtype == torch.float32 and lse.is_contiguous(), "flash backward's log-sum-exp")
    return _backward(grad, q, k, v, out, lse, None, causal, scale)


def _check_bias(bias, q, k):
    if bias is None:
        return
    block = 8 if q.dtype in (torch.float16, torch.bfloat16) else 4
    _need(bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2]), f"bias {bias.dtype} {tuple(bias.shape)}")
    strides = [stride for size, stride in zip(bias.shape[:3], bias.stride()[:3], strict=True) if size > 1]
    aligned = all(stride % block == 0 for stride in (*strides, bias.storage_offset()))
    _need(bias.stride(-1) == 1 and aligned, f"bias with strides {bias.stride()}")


def _efficient(gpu, q, k, v, bias, compute_lse, dropout=0.0, causal=False, *, scale=None):
    gpu.backends["efficient with bias" if bias is not None else "efficient"] += 1
    _need(k.shape[1] == q.shape[1] and all(x.stride(-1) == 1 for x in (q, k, v)), "grouped keys")
    _check_bias(bias, q, k)
    out, lse = _forward(q, k, v, bias, causal, scale)
    lse = torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=math.inf) if compute_lse else lse[..., :0]
    return out, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _efficient_backward(gpu, grad, q, k, v, bias, out, lse, seed, offset, dropout, mask, causal=False, *, scale=None):
    gpu.backends["efficient backward"] += 1
    _need(lse.shape[-1] % 32 == 0 and lse.shape[-1] >= q.shape[2], f"log-sum-exp of {lse.shape[-1]} queries")
    _check_bias(bias, q, k)
    _need(all(x.stride(-1) == 1 for x in (grad, q, k, v)), "last dimension with gaps")
    _need(out.transpose(1, 2).is_contiguous(), "output, whose strides in half precision are taken for granted,")
    return (*_backward(grad, q, k, v, out, lse[..., : q.shape[2]], bias, causal, scale), None)


def _choice(gpu, q, k, v, attn_mask=None, dropout=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Return what `scaled_dot_product_attention` would take: 1 flash, 2 efficient, 0 plain products."""
    if q.dtype in (torch.float16, torch.bfloat16) and attn_mask is None and q.shape[-1] % 8 == 0:
        return 1
    return 0 if enable_gqa and k.shape[1] != q.shape[1] else 2


_EMULATED: dict[object, Callable] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._fused_sdp_choice.default: _choice,
}


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")  # the device draws on the CPU


class _Properties:
    name, total_memory, multi_processor_count = "simulated GPU", 80 << 30, 132


@cache
def _register() -> None:
    # autograd asks the accelerator for its streams; a registered private backend comes before CUDA and has none
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    # whoever asks this process's accelerator afterwards, as gradient checkpointing does
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Give a GPU for the length of the block; models and tensors are moved to `NAME`."""
    _register()
    cuda = {
        "_lazy_init": lambda: None, "reset_peak_memory_stats": lambda *_: None, "empty_cache": lambda: None,
        "max_memory_allocated": lambda *_: 1 << 30, "max_memory_reserved": lambda *_: 1 << 30,
        "memory_allocated": lambda *_: 1 << 30, "memory_reserved": lambda *_: 1 << 30, "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: _Properties, "get_device_name": lambda *_: _Properties.name,
        "mem_get_info": lambda *_: (79 << 30, 80 << 30),
    }  # fmt: skip
    make = torch.tensor

    def tensor(data, *args, **kwargs):
        if isinstance(data, list | tuple):
            data = pytree.tree_map(lambda x: x.item() if isinstance(x, _OnGpu) else x, data)
        return make(data, *args, **kwargs)

    swaps, lifts = torch.__future__.get_overwrite_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "tensor", tensor))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(patch.object(kernels, "CUDA", NAME))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, swaps)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        SimulatedGpu.active = stack.enter_context(SimulatedGpu())
        yield SimulatedGpu.active
