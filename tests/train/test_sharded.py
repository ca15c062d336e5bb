"""ZeRO-3: a rank has its share of the backbone, while it loads and afterwards, and all numbers are what they were."""

from __future__ import annotations

import os
import traceback
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from pipeline import backbones
from pipeline.backbones.base import gathered
from pipeline.backbones.load import Zero
from pipeline.config.load import TrialRequest
from pipeline.records.store import TrialStore
from pipeline.train import engine
from pipeline.train.counting import _Living
from pipeline.train.workbench import Workbench, join_group
from tests.support.ranks import fresh_processes

SHORT = {
    "epochs": 2, "num_train_samples": 5, "num_selection_samples": 3, "micro_batch_size": 2, "accumulation": 1,
    "world_size": 2, "engine": "deepspeed", "zero_stage": 3,
}  # fmt: skip
TRIALS = {"mimic": {}, "prompt": {"selection_metric": "loss"}, "hificl": {"precision": "bf16"}}
LINEAR = torch.nn.functional.linear
PLAIN, LOAD = engine.deepspeed_config, backbones.load_from


class Held(_Living):
    """The most bytes that tensors of the CPU had at once, those of a mapped file left out."""

    def __init__(self, mapped: int) -> None:
        super().__init__(torch.nn.Module())
        self.mapped = mapped

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(out):
            if (
                isinstance(made, torch.Tensor)
                and made.device.type == "cpu"
                and made.untyped_storage().nbytes() != self.mapped
            ):
                self._note(made.untyped_storage())
        return out


def as_of_a_large_backbone(config, trainable):
    """DeepSpeed's configuration with which nothing stays whole because it is small."""
    made = PLAIN(config, trainable)
    limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    made["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits}
    return made


def whole_at_first(*given, zero: Zero | None = None, **named):
    """Load as before: every rank reads the whole backbone, and DeepSpeed takes it apart when a trial begins."""
    loaded = LOAD(*given, **named)
    loaded.passes.together = zero is not None
    return loaded


def train(bench: Workbench, request: TrialRequest, folder: Path, *, interrupted: bool = False) -> tuple:
    """Train a trial to its end; return what it lost in every step, and by what it was chosen."""
    request = replace(request, folder=str(folder / request.key))
    bench.admit(request)
    assert torch.nn.functional.linear is zero3_linear_wrap  # torch's own holds on to all weights for the backward pass
    bench.advance()
    if interrupted:
        bench.evict(request.key)
        bench = Workbench(device="cpu")
        assert bench.admit(request) == 1
    (report,) = bench.advance()
    assert report.end == "finished" and report.metrics is not None
    assert torch.nn.functional.linear is LINEAR
    losses = TrialStore(folder).trial(request.key).losses()
    return losses, report.metrics.selection_score, report.metrics.selection_loss, report.metrics.gradient_norm


def weights(request: TrialRequest, zero: Zero | None = None) -> torch.nn.Module:
    config = request.config
    return backbones.load_from(config.backbone, request.source, dtype=config.precision, zero=zero).model


def size_of_file(request: TrialRequest) -> int:
    return (Path(str(request.source.weights)) / "model.safetensors").stat().st_size


def _rank(rank: int, meeting: str, folder: Path, requests: list[TrialRequest], queue) -> None:
    torch.set_num_threads(1)
    join_group("cpu", rank, 2, meeting)
    found: dict = {}
    try:
        parts, whole = weights(requests[0], Zero()), weights(requests[0]).state_dict()
        found["held"] = sum(parameter.nbytes + parameter.ds_tensor.nbytes for parameter in parts.parameters())
        with Held(size_of_file(requests[0])) as held:
            weights(requests[0], Zero())
        found["most"] = held.peak
        with gathered(parts):
            now = parts.state_dict()
            found["equal"] = now.keys() == whole.keys() and all(torch.equal(now[name], whole[name]) for name in whole)
        for way in ("parts", "cut", "large", "whole"):
            engine.deepspeed_config = as_of_a_large_backbone if way == "large" else PLAIN
            backbones.load_from = whole_at_first if way == "whole" else LOAD
            bench = Workbench(device="cpu")
            of_way = requests[:1] if way == "cut" else requests
            found[way] = [train(bench, request, folder / way, interrupted=way == "cut") for request in of_way]
        queue.put((rank, found))
        dist.barrier()
    except Exception:
        queue.put((rank, traceback.format_exc()))
        raise
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(trial, tmp_path_factory) -> dict[int, dict]:
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    requests = [replace(trial(name, folder, **SHORT, **given), pack_key=None) for name, given in TRIALS.items()]
    context = fresh_processes()
    queue = context.Queue()
    given = (str(folder / "meeting"), folder, requests, queue)
    processes = [context.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = dict(queue.get(timeout=400) for _ in processes)
        assert all(isinstance(of_rank, dict) for of_rank in found.values()), found
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.mark.slow
def test_a_rank_has_its_share_and_while_it_loads_a_parameter_more(of_ranks, trial, tmp_path):
    request = trial("mimic", tmp_path, **SHORT)
    each = [parameter.nbytes for parameter in weights(request).parameters()]
    share = sum(each) / 2
    with Held(size_of_file(request)) as whole, patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
        weights(request)
    assert whole.peak >= sum(each)
    for of_rank in of_ranks.values():
        assert of_rank["equal"] and of_rank["most"] > 0.9 * share
        assert share <= of_rank["held"] <= share + 4 * len(each)  # those of an odd number are filled up
        assert of_rank["most"] <= share + max(each) < 0.6 * sum(each)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(TRIALS)), ids=list(TRIALS))
def test_what_is_loaded_in_parts_trains_chooses_and_resumes_as_what_was_whole(of_ranks, number):
    first, second = of_ranks.values()
    whole = first["whole"][number]
    assert whole == second["whole"][number] and len(whole[0]) == 2
    for way in ("parts", "large", *(["cut"] if number == 0 else [])):
        assert first[way][number] == second[way][number] == whole, way
