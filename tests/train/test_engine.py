"""Both engines on a small real model: equal losses, equal after a resume, ZeRO 0 to 3, one rank and two."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.config.trial import TrialConfig, engine_packs
from pipeline.core.errors import WorkError
from pipeline.train.engine import ENGINES, Student
from tests.support.free_port import free_port

STEPS = 6


def config(**fields) -> TrialConfig:
    base = {"backbone": "b", "backbone_digest": "", "task": "t", "manifest_digest": "", "method": "m"}
    return TrialConfig(**base, learning_rate=1e-2, gradient_clip=0.05, micro_batch_size=2, **fields)


def make(kind: str, cfg: TrialConfig):
    torch.manual_seed(0)
    adapter = torch.nn.Sequential(torch.nn.Linear(16, 4, bias=False), torch.nn.Linear(4, 16))
    backbone = torch.nn.Linear(16, 16).requires_grad_(False)

    def loss(share):
        x, weight = share
        return ((backbone(adapter(x)) - x) ** 2).mean(1).sum() * weight

    student = Student(adapter, backbone if cfg.zero_stage == 3 else None)
    groups = [{"params": list(adapter.parameters()), "lr": cfg.learning_rate, "weight_decay": 0.05}]
    return ENGINES[kind](student, groups, cfg), loss


def losses(
    kind: str, cfg: TrialConfig, rank: int = 0, world: int = 1, resume_at: int | None = None, folder=None
) -> list[float]:
    engine, loss = make(kind, cfg)
    data = torch.randn(STEPS, 2, 4, 16, generator=torch.Generator().manual_seed(1))  # step, micro-batch, sample
    out = []
    for step in range(STEPS):
        total = 0.0
        for index in range(2):
            share = data[step, index][rank::world]
            value = engine.forward(lambda share=share, loss=loss: loss((share, 1 / 8)))
            total += value.item()
            engine.backward(value, last=index == 1)
        engine.step(1.0)
        out.append(total)
        if step == resume_at:
            engine.save(folder)
            engine.close()
            engine, loss = make(kind, cfg)
            engine.load(folder)
    engine.close()
    return out


@pytest.fixture(scope="module")
def one_rank():
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def oracle(one_rank):
    found = losses("torch", config())
    assert found[-1] < found[0]  # it learns at all
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_gives_the_losses_of_plain_torch(oracle, stage):
    assert losses("deepspeed", config(zero_stage=stage)) == pytest.approx(oracle, abs=1e-6)


@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 2), ("deepspeed", 3)])
def test_a_resumed_engine_goes_on_bit_for_bit(oracle, tmp_path, kind, stage):
    cfg = config(zero_stage=stage)
    assert losses(kind, cfg, resume_at=2, folder=tmp_path) == losses(kind, cfg)


@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_engines_that_share_a_backward_pass_step_as_they_do_alone(oracle, kind, stage):
    cfg = config(zero_stage=stage)
    assert engine_packs(cfg.model_copy(update={"engine": kind}))
    made = [make(kind, cfg) for _ in range(2)]
    data = torch.randn(STEPS, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for step in range(STEPS):
        total = 0.0
        for index in range(2):
            values = [loss((data[step, index], 1 / 8)) for _, loss in made]
            total += values[1].item()
            scaled = [engine.for_joint_backward(value) for (engine, _), value in zip(made, values, strict=True)]
            torch.stack(scaled).sum().backward()
        for engine, _ in made:
            engine.step(1.0)
        found.append(total)
    for engine, _ in made:
        engine.close()
    assert found == pytest.approx(oracle, abs=1e-6)


@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)])
def test_a_step_that_is_begun_again_in_smaller_pieces_is_the_same_step(oracle, kind, stage):
    engine, loss = make(kind, config(zero_stage=stage))
    data = torch.randn(STEPS, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for step in range(STEPS):
        engine.backward(engine.forward(lambda step=step: loss((data[step, 0], 1 / 8))), last=False)
        engine.forget()  # as when the second micro-batch runs out of memory
        total = 0.0
        for rows in data[step].flatten(0, 1).split(1):
            value = engine.forward(lambda rows=rows: loss((rows, 1 / 8)))
            total += value.item()
            engine.backward(value, last=False)
        engine.step(1.0)
        found.append(total)
    engine.close()
    assert found == pytest.approx(oracle, abs=1e-6)


def test_zero_3_says_that_it_cannot_begin_again(oracle):
    engine, _ = make("deepspeed", config(zero_stage=3))
    with pytest.raises(WorkError, match=r"ZeRO-3 cannot take a half-done step back.*Lower train.micro_batch_size"):
        engine.forget()
    engine.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_buckets_are_the_adapters_size(oracle, stage, monkeypatch):
    taken, empty = [], torch.empty

    def noting(*args, **kwargs):
        made = empty(*args, **kwargs)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", noting)
    losses("deepspeed", config(zero_stage=stage))
    assert max(taken, default=0) < 1 << 20  # 1.9 GB by its own default


def test_the_fixed_loss_scale_of_fp16_changes_nothing(oracle):
    assert losses("torch", config(precision="fp16")) == pytest.approx(oracle, abs=1e-6)


def _rank(rank: int, world: int, port: int, kind: str, stage: int, queue) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo", rank=rank, world_size=world)
    queue.put((rank, losses(kind, config(zero_stage=stage, world_size=world), rank, world)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 2)])
def test_two_ranks_give_the_losses_of_one(oracle, kind, stage):
    context = mp.get_context("spawn")
    queue, port = context.Queue(), free_port()
    ranks = [context.Process(target=_rank, args=(r, 2, port, kind, stage, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join(60)
    together = [a + b for a, b in zip(found[0], found[1], strict=True)]
    assert together == pytest.approx(oracle, abs=1e-6)
