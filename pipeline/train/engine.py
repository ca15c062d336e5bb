"""The optimiser's side of a step: accumulate, reduce over ranks, clip, AdamW, save, load.

Two engines with one interface. `DeepSpeedEngine` is the default: ZeRO stages 0 to 3, offload, several ranks.
`TorchEngine` needs torch alone (a bare GPU box, the tests' oracle); with one rank and stage 0 both give the same
losses. The caller scales each micro-batch's loss so that their sum over ranks and micro-batches is the global mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.adapters.base import ParameterGroup
from pipeline.backbones.base import gathered, import_deepspeed
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError, WorkError

_STATE = ("parameter", "exp_avg", "exp_avg_sq", "step")  # of each parameter, in a file of `Engine.save`
_LINEAR = nn.functional.linear
ADAM_EPSILON = 1e-8
# fp16 gradients of activations underflow below 6e-8. AdamW is invariant to a scale of the gradients if its epsilon and
# the clip threshold are scaled too, so a fixed scale is exact and needs no unscaling inside ZeRO's partitions.
FP16_LOSS_SCALE = 1024.0
LossFunction = Callable[[], Tensor]  # runs the student's forward pass; returns the micro-batch's share of the loss


class Engine(Protocol):
    """What a training step needs of an engine."""

    def forward(self, loss: LossFunction) -> Tensor:
        """Run the student's forward pass; return the micro-batch's share of the loss."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run the backward pass of one micro-batch; `last` marks the last one before `step`."""

    def for_joint_backward(self, loss: Tensor) -> Tensor:
        """Return what is added to the other trials' losses of a pack, to run backward once for all of them."""

    def step(self, learning_rate_scale: float) -> Tensor:
        """Clip, update at the scaled learning rate, zero the gradients; return the gradient norm before clipping.

        A scalar on the parameters' device: whoever asks for its value waits for the step.
        """

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which the adapter's parameters are whole on every rank (every rank enters it)."""

    def save(self, folder: Path) -> None:
        """Write parameters and optimiser state (every rank calls it)."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            InputError: it is not there, not this engine's or of other parameters; no pickle is opened.
        """

    def forget(self) -> None:
        """Drop the gradients of a step that did not come to its end.

        Raises:
            WorkError: they are partly reduced already (ZeRO-3); the trial must go back to its checkpoint.
        """

    def close(self) -> None:
        """Free what the engine holds; the backbone stays."""


class Student(nn.Module):
    """The module that an engine trains: the adapter's parameters; its forward runs what it is given.

    The frozen backbone is registered as a sub-module only where ZeRO-3 must shard it. Otherwise the engine would move,
    cast and broadcast eight billion frozen parameters at every trial's start.
    """

    def __init__(self, adapter: nn.Module, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.adapter = adapter
        self.backbone = backbone

    def forward(self, loss: LossFunction) -> Tensor:
        """Return the micro-batch's share of the loss."""
        return loss()


def loss_scale(config: TrialConfig) -> float:
    """Return the scale on the loss that keeps low-precision gradients representable."""
    return FP16_LOSS_SCALE if config.precision == "fp16" else 1.0


def make_optimizer(groups: list[ParameterGroup], config: TrialConfig, *, fused: bool) -> torch.optim.AdamW:
    """Return AdamW over the adapter's parameter groups (each with its own `lr` and `weight_decay`).

    Args:
        groups: the adapter's.
        config: learning rate and precision.
        fused: one operator a step: a third to a half of the time of one for all tensors (`foreach`), on a CPU too.
    """
    return torch.optim.AdamW(
        map(dict, groups),
        lr=config.learning_rate,
        eps=ADAM_EPSILON * loss_scale(config),
        foreach=not fused,
        fused=fused,
    )


def set_learning_rates(optimizer: Any, learning_rates: Sequence[float], scale: float) -> None:
    """Give every parameter group of an optimiser its own learning rate, scaled."""
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate * scale  # torch's word


def _save(file: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write `parameter.<i>` and AdamW's `exp_avg.<i>`, `exp_avg_sq.<i>` and `step.<i>`."""
    tensors = {f"parameter.{i}": p.detach().contiguous() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        for name, value in optimizer.state.get(p, {}).items():
            tensors[f"{name}.{i}"] = torch.as_tensor(value).contiguous()
    save_file(tensors, file)


@torch.no_grad()
def _load(file: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    try:
        tensors = load_file(file)
        for i, p in enumerate(parameters):
            saved = {name: tensors.pop(f"{name}.{i}") for name in _STATE if f"{name}.{i}" in tensors}
            sizes = {saved[name].shape for name in saved if name != "step"}
            if sizes != {p.shape}:
                raise ValueError(f"parameter {i} has the shape {list(p.shape)}, the file has other ones")
            p.copy_(saved.pop("parameter"))
            for name, value in saved.items():
                if torch.is_tensor(there := optimizer.state[p].get(name)):
                    there.copy_(value)  # in its place: ZeRO keeps some where it put them
                else:
                    optimizer.state[p][name] = value if name == "step" else value.to(p.device)
        if tensors:
            raise ValueError(f"unknown tensor {min(tensors)}")
    except (SafetensorError, ValueError, KeyError, FileNotFoundError) as error:
        way_out = f"Remove {file.parent} to go on at the checkpoint before"
        raise InputError(f"not this engine's state: {error}", where=str(file), way_out=way_out) from None


class TorchEngine:
    """AdamW over the adapter alone; gradients are summed over ranks where there are several."""

    def __init__(self, student: Student, groups: list[ParameterGroup], config: TrialConfig) -> None:
        self.student, self.config = student, config
        self.scale = loss_scale(config)
        self.learning_rates = [group["lr"] for group in groups]
        self.optimizer = make_optimizer(groups, config, fused=True)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def forward(self, loss: LossFunction) -> Tensor:
        """See `Engine.forward`."""
        return self.student(loss)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        self.for_joint_backward(loss).backward()

    def for_joint_backward(self, loss: Tensor) -> Tensor:
        """See `Engine.for_joint_backward`."""
        return loss * self.scale

    def step(self, learning_rate_scale: float) -> Tensor:
        """See `Engine.step`."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._sum_over_ranks()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip * self.scale)
        set_learning_rates(self.optimizer, self.learning_rates, learning_rate_scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.double() / self.scale

    def _sum_over_ranks(self) -> None:
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat)
        for p, g in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = g.view_as(p)

    def whole(self) -> AbstractContextManager[None]:
        """See `Engine.whole`."""
        return nullcontext()

    def save(self, folder: Path) -> None:
        """See `Engine.save`; the ranks hold the same state, so the first one writes."""
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            _save(folder / "engine.safetensors", self.parameters, self.optimizer)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        _load(folder / "engine.safetensors", self.parameters, self.optimizer)

    def forget(self) -> None:
        """See `Engine.forget`."""
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """See `Engine.close`."""
        self.optimizer.zero_grad(set_to_none=True)


class DeepSpeedEngine:
    """DeepSpeed's engine behind the same interface; ZeRO stage, offload and ranks from the trial's configuration.

    Below stage 3 the adapter's parameters learn their gradients as under plain torch, and DeepSpeed, which has copies
    of them, sees one backward pass a step: of a loss whose gradients are those. So a step that ran out of memory is
    begun again as if nothing had happened, on this rank alone if need be, and ranks reduce once a step.
    """

    def __init__(self, student: Student, groups: list[ParameterGroup], config: TrialConfig) -> None:
        deepspeed = import_deepspeed()
        self.student, self.config = student, config
        self.scale = loss_scale(config)
        if not torch.distributed.is_initialized():
            way_out = "Train by `hificl sweep`, which starts the ranks, or set train.engine: torch"
            raise WorkError("torch.distributed is not initialised", where="train.engine: deepspeed", way_out=way_out)
        self.learning_rates = [group["lr"] for group in groups]
        self.parameters = [p for group in groups for p in group["params"]]
        self.copies: nn.ParameterList | None = None
        if config.zero_stage < 3:
            self.copies = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in self.parameters)
            copies = iter(self.copies)
            groups = [{**group, "params": [next(copies) for _ in group["params"]]} for group in groups]
        # DeepSpeed updates its own flat partitions, few and large, wherever it has put them
        self.optimizer = make_optimizer(groups, config, fused=False)
        self.engine, *_ = deepspeed.initialize(
            model=student if self.copies is None else _Copies(self.copies),
            optimizer=self.optimizer,
            config=deepspeed_config(config, sum(p.numel() for p in self.parameters)),
            dist_init_required=False,
        )
        if config.zero_stage == 3:  # it holds on to no weights; DeepSpeed puts it there with a backbone's first engine
            nn.functional.linear = deepspeed.runtime.zero.linear.zero3_linear_wrap

    def forward(self, loss: LossFunction) -> Tensor:
        """See `Engine.forward`."""
        return self.engine(loss) if self.copies is None else loss()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        if self.copies is None:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss * (self.scale * self.config.world_size))  # which it averages over ranks
        else:
            self.for_joint_backward(loss).backward()

    def for_joint_backward(self, loss: Tensor) -> Tensor:
        """See `Engine.for_joint_backward`."""
        return loss * self.scale

    def step(self, learning_rate_scale: float) -> Tensor:
        """See `Engine.step`."""
        if self.copies is not None:
            self._hand_over(self.copies)
        set_learning_rates(self.engine.optimizer, self.learning_rates, learning_rate_scale)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if self.copies is not None:
            self._take_back(self.copies)
        known = float("nan") if norm is None else norm
        return torch.as_tensor(known, dtype=torch.float64, device=self.parameters[0].device) / self.scale

    def _hand_over(self, copies: nn.ParameterList) -> None:
        """Give DeepSpeed the step's gradients; it averages over ranks where the interface asks for a sum."""
        world = self.config.world_size
        # of all parameters, so that all ranks reduce the same
        grads = [torch.zeros_like(p) if p.grad is None else p.grad * world for p in self.parameters]
        self.engine.set_gradient_accumulation_boundary(True)
        products = [(copy * grad).sum() for copy, grad in zip(copies, grads, strict=True)]
        self.engine.backward(self.engine(lambda: torch.stack(products).sum()))
        self.forget()

    def _take_back(self, copies: nn.ParameterList) -> None:
        with torch.no_grad():
            for copy, parameter in zip(copies, self.parameters, strict=True):
                parameter.copy_(copy)

    def whole(self) -> AbstractContextManager[None]:
        """See `Engine.whole`."""
        if self.config.zero_stage < 3:
            return nullcontext()
        return gathered(self.student.adapter)

    def save(self, folder: Path) -> None:
        """See `Engine.save`; each rank writes its partition, in `TorchEngine`'s layout: DeepSpeed's are pickles."""
        _save(self._file(folder), self._partitions(), self.optimizer)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        file, zero = self._file(folder), self.engine.optimizer
        if not file.exists() and (folder / "engine").is_dir():
            raise InputError(
                "a checkpoint of an earlier version, in pickles, which could run code and are not opened",
                where=str(folder),
                way_out=f"Remove {folder.parent} to begin again, or let the version that wrote it go on",
            )
        stage = self.config.zero_stage
        if stage == 3:
            zero.checkpoint_event_prologue()  # what is whole becomes a partition again
        _load(file, self._partitions(), self.optimizer)
        if stage == 3:
            flat = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
            for index, (working, partition) in enumerate(flat):
                working.data.copy_(partition.data)
                group = zero.fp16_partitioned_groups[index]
                for part, value in zip(group, zero.unflatten(working, group), strict=True):
                    part.data = value.data
            zero.checkpoint_event_epilogue()
        elif stage > 0:
            rank = torch.distributed.get_rank()
            shares = zip(zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
            for of_ranks, partition in shares:  # the parameters are views of the shares of all ranks
                share = partition.data.to(of_ranks[rank].device, of_ranks[rank].dtype)
                torch.distributed.all_gather(list(of_ranks), share)
        if self.copies is not None:
            self._take_back(self.copies)

    def _file(self, folder: Path) -> Path:
        return folder / f"engine-rank{torch.distributed.get_rank():04d}.safetensors"

    def _partitions(self) -> list[Tensor]:
        """Return what AdamW updates on this rank: parameters, or ZeRO's flat fp32 partition of each of their groups."""
        zero = self.engine.optimizer
        match self.config.zero_stage:
            case 0:
                return [p for group in self.optimizer.param_groups for p in group["params"]]
            case 3:
                return list(zero.fp32_partitioned_groups_flat)
            case _:
                return list(zero.single_partition_of_fp32_groups)

    def forget(self) -> None:
        """See `Engine.forget`."""
        if self.copies is None:
            raise WorkError(
                "the memory ran out, and ZeRO-3 cannot take a half-done step back",
                where=self.config.key,
                way_out="Lower train.micro_batch_size and raise train.accumulation, or set train.zero_stage to 2",
            )
        for parameter in self.parameters:
            parameter.grad = None

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.destroy()
        # ZeRO-3 leaves one in its place that keeps every input: a third more memory for the trials behind it
        nn.functional.linear = _LINEAR


class _Copies(nn.Module):
    """What DeepSpeed trains below stage 3: copies of the adapter's parameters."""

    def __init__(self, copies: nn.ParameterList) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, loss: LossFunction) -> Tensor:
        """Return what it is given."""
        return loss()


def deepspeed_config(config: TrialConfig, trainable: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a trial.

    Accumulation is ours (`set_gradient_accumulation_boundary`), because the last batch of an epoch may be short.

    Args:
        config: the trial.
        trainable: values of its adapter: the size of a bucket, of which DeepSpeed takes two by default 1.9 GiB in fp32.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage, "reduce_bucket_size": trainable, "allgather_bucket_size": trainable,
    }  # fmt: skip
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clip * loss_scale(config),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


ENGINES: dict[str, type[TorchEngine] | type[DeepSpeedEngine]] = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}
