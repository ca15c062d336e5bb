"""Both engines on a small real model: equal losses, equal after a resume, ZeRO 0 to 3, one rank and two."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pipeline.config.trial import TrialConfig, engine_packs
from pipeline.core.errors import InputError, WorkError
from pipeline.train.engine import ENGINES, Student
from pipeline.train.workbench import join_group
from tests.support.ranks import fresh_processes

STEPS = 6


class Bomb:
    """What unpickling would do: leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


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
    kind: str, cfg: TrialConfig, rank: int = 0, world: int = 1, resume_at: int | None = None, folder=None, again=False
) -> list[float]:
    """Return each step's loss; `again`: every step begins anew after its first pass, with one sample in a pass."""
    engine, loss = make(kind, cfg)
    data = torch.randn(STEPS, 2, 4, 16, generator=torch.Generator().manual_seed(1))  # step, micro-batch, sample
    out = []
    for step in range(STEPS):
        total = 0.0
        shares = [data[step, index][rank::world] for index in range(2)]
        if again:
            engine.backward(engine.forward(lambda share=shares[0], loss=loss: loss((share, 1 / 8))), last=False)
            engine.forget()
            shares = list(torch.cat(shares).split(1))
        for share in shares:
            value = engine.forward(lambda share=share, loss=loss: loss((share, 1 / 8)))
            total += value.item()
            engine.backward(value, last=share is shares[-1])
        engine.step(1.0)
        out.append(total)
        if step == resume_at:
            engine.save(folder)
            dist.barrier()
            engine.close()
            engine, loss = make(kind, cfg)
            engine.load(folder)
    engine.close()
    return out


@pytest.fixture(scope="module", autouse=True)
def plain_linear():
    """DeepSpeed's stage 3 puts a linear layer of its own in the place of torch's, and never takes it back."""
    before = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = before


@pytest.fixture(scope="module")
def one_rank():
    join_group("cpu", 0, 1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def oracle(one_rank):
    found = losses("torch", config())
    assert found[-1] < found[0]  # it learns at all
    return found


def test_a_rank_alone_listens_on_loopback(one_rank):
    listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_gives_the_losses_of_plain_torch(oracle, stage):
    linear = torch.nn.functional.linear
    assert losses("deepspeed", config(zero_stage=stage)) == pytest.approx(oracle, abs=1e-6)
    assert torch.nn.functional.linear is linear  # which ZeRO-3 changes for the whole process


@pytest.mark.parametrize(
    ("kind", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
)
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
    assert losses(kind, config(zero_stage=stage), again=True) == pytest.approx(oracle, abs=1e-6)


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


def _rank(rank: int, machines: int, kind: str, stage: int, folder: Path, queue, meetings) -> None:
    torch.set_num_threads(1)
    meeting, listener = str(folder / "meeting"), None
    if machines == 2 and rank == 0:
        server = socket.create_server(("127.0.0.1", 0))
        meeting, listener = f"tcp://127.0.0.1:{server.getsockname()[1]}", server.detach()
        meetings.put(meeting)
    elif machines == 2:
        meeting = meetings.get(timeout=100)
    join_group("cpu", rank, 2, meeting, listener)
    cfg = config(zero_stage=stage, world_size=2)
    ports = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    again = rank == 0 and stage < 3  # the memory runs out on the first rank alone
    undisturbed = losses(kind, cfg, rank, 2, again=again)
    resumed = losses(kind, cfg, rank, 2, resume_at=2, folder=folder, again=again)
    queue.put((rank, undisturbed, resumed, ports, "mlflow" in sys.modules))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage", "machines"), [("torch", 0, 1), ("deepspeed", 2, 1), ("deepspeed", 3, 2)])
def test_two_ranks_give_the_losses_of_one_and_go_on_bit_for_bit(oracle, tmp_path, kind, stage, machines):
    """On one machine and, as far as the meeting goes, on two; nobody listens on every interface."""
    context = fresh_processes()
    queue, meetings = context.Queue(), context.Queue()
    given = (machines, kind, stage, tmp_path, queue, meetings)
    ranks = [context.Process(target=_rank, args=(rank, *given)) for rank in range(2)]
    for process in ranks:
        process.start()
    by_rank = {rank: rest for rank, *rest in (queue.get(timeout=300) for _ in ranks)}
    for process in ranks:
        process.join(60)
    together = [a + b for a, b in zip(by_rank[0][0], by_rank[1][0], strict=True)]
    assert together == pytest.approx(oracle, abs=1e-6)
    for undisturbed, resumed, addresses, took_mlflow in by_rank.values():
        assert resumed == undisturbed and addresses == {"127.0.0.1"}
        assert not took_mlflow  # as DeepSpeed's autotuner does
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_forged_checkpoint_runs_nothing(one_rank, tmp_path, stage):
    """A pickle in the place of DeepSpeed's files of an earlier version, or of this version's file."""
    engine, _ = make("deepspeed", config(zero_stage=stage))
    bomb = pickle.dumps(Bomb(tmp_path / "trace"))
    old = tmp_path / "epoch-0001"
    (old / "engine").mkdir(parents=True)
    (old / "latest").write_text("engine")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(Bomb(tmp_path / "trace"), old / "engine" / name)
    with pytest.raises(InputError, match=r"in pickles, which could run code.*Remove .* to begin again"):
        engine.load(old)
    for content in (bomb, b"", b"\xff" * 64):
        (tmp_path / "engine-rank0000.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"engine-rank0000.safetensors: not this engine's state"):
            engine.load(tmp_path)
    engine.close()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("change", ["shape", "lacking", "more"])
def test_a_state_of_other_parameters_is_refused(one_rank, tmp_path, change):
    engine, _ = make("torch", config())
    engine.save(tmp_path)
    tensors = load_file(tmp_path / "engine.safetensors")
    tensors |= {"shape": {"parameter.0": torch.zeros(1)}, "more": {"parameter.9": torch.zeros(1)}, "lacking": {}}[
        change
    ]
    if change == "lacking":
        del tensors["parameter.0"]
    save_file(tensors, tmp_path / "engine.safetensors")
    with pytest.raises(InputError, match="not this engine's state"):
        engine.load(tmp_path)


def test_under_zero_3_an_adapter_of_any_size_is_whole_where_it_is_kept(one_rank):
    """DeepSpeed leaves small parameters whole, and of larger ones each rank a part."""
    torch.manual_seed(0)
    adapter = torch.nn.Linear(400, 400)
    wanted = {name: value.clone() for name, value in adapter.state_dict().items()}
    cfg = config(zero_stage=3)
    groups = [{"params": list(adapter.parameters()), "lr": cfg.learning_rate, "weight_decay": 0.0}]
    engine = ENGINES["deepspeed"](Student(adapter, torch.nn.Linear(4, 4).requires_grad_(False)), groups, cfg)
    assert adapter.weight.numel() == 0
    with engine.whole():
        kept = {name: value.clone() for name, value in adapter.state_dict().items()}
    engine.close()
    assert kept.keys() == wanted.keys() and all(torch.equal(kept[name], wanted[name]) for name in wanted)
