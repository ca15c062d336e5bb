"""Two ranks train every method as one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import adapters, methods
from pipeline.config.load import TrialRequest
from pipeline.records.store import TrialStore
from pipeline.train.workbench import Workbench, join_group

SHORT = {"epochs": 1, "num_train_samples": 7, "num_selection_samples": 3}  # the last batch leaves one rank without


def without_dropout(method: str) -> dict:
    """Ranks draw masks of their own, so only training without dropout can be compared."""
    names = methods.option_names(method)
    return {"dropout": 0.0} if "dropout" in names else {"lora": {"dropout": 0.0}} if "lora" in names else {}


def train(bench: Workbench, request: TrialRequest) -> tuple[float, ...]:
    """Return an epoch's loss and score, and the loss of every step."""
    bench.admit(request)
    (report,) = bench.advance()
    store = TrialStore(Path(request.folder).parent)
    return report.metrics.train_loss, report.metrics.selection_score, *store.trial(request.key).losses().get(1, ())


def _rank(rank: int, meeting: str, requests: list[TrialRequest], queue) -> None:
    torch.set_num_threads(1)
    join_group("cpu", rank, 2, meeting)
    try:
        bench = Workbench(device="cpu")
        found = [train(bench, request) for request in requests]
        if rank == 0:
            queue.put(found)
        dist.barrier()
    except Exception as error:
        queue.put(error)
        raise
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_every_method_as_one_process_does(trial, tmp_path: Path):
    def requests(world: int) -> list[TrialRequest]:
        step = {"micro_batch_size": 2 // world, "accumulation": 1, "world_size": world}
        made = [
            trial(method, tmp_path / f"{world}", **SHORT, **step, **without_dropout(method))
            for method in adapters.names()
        ]
        return [replace(request, pack_key=None) for request in made]

    bench = Workbench(device="cpu")
    alone = [train(bench, request) for request in requests(1)]
    context = mp.get_context("spawn")
    queue, meeting = context.Queue(), str(tmp_path / "meeting")
    ranks = [context.Process(target=_rank, args=(rank, meeting, requests(2), queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    together = queue.get(timeout=200)
    for process in ranks:
        process.join(60)
    assert not isinstance(together, Exception), together
    for method, one, two in zip(adapters.names(), alone, together, strict=True):
        assert two == pytest.approx(one, abs=1e-5), method
