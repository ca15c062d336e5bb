"""Two ranks train every method as one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline import adapters, methods
from pipeline.config.load import TrialRequest
from pipeline.records.store import TrialStore
from pipeline.train.workbench import Stopped, Workbench, join_group
from tests.support.ranks import fresh_processes

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


def _rank(rank: int, meeting: str, work, requests: list[TrialRequest], queue) -> None:
    torch.set_num_threads(1)
    join_group("cpu", rank, 2, meeting)
    try:
        found = work(requests, rank)
        if rank == 0:
            queue.put(found)
        dist.barrier()
    except Exception as error:
        queue.put(error)
        raise
    dist.destroy_process_group()


def of_two_ranks(work, requests: list[TrialRequest], meeting: Path):
    """Let two ranks do `work(requests, rank)`; return what the first has found."""
    context = fresh_processes()
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(meeting), work, requests, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = queue.get(timeout=200)
    for process in ranks:
        process.join(60)
    assert not isinstance(found, Exception), found
    return found


def trained(requests: list[TrialRequest], rank: int) -> list[tuple[float, ...]]:
    bench = Workbench(device="cpu")
    return [train(bench, request) for request in requests]


def stopped(requests: list[TrialRequest], rank: int) -> list[str]:
    """Train the first trial, and the second with the other rank told to stop behind its first step; and go on."""
    whole, cut = requests
    bench = Workbench(device="cpu")
    train(bench, whole)
    other, count = Workbench(device="cpu"), Workbench._count

    def counted(self):
        self.stopping = self is other and rank == 1 and self.loop.trials[0].step == 1
        count(self)

    Workbench._count = counted
    with pytest.raises(Stopped):
        train(other, cut)
    other.evict(cut.key)
    kept = [path.name for path in (Path(cut.folder) / "checkpoint").iterdir()]
    train(bench, cut)
    return kept


@pytest.mark.slow
def test_two_ranks_train_every_method_as_one_process_does(trial, tmp_path: Path):
    def requests(world: int) -> list[TrialRequest]:
        step = {"micro_batch_size": 2 // world, "accumulation": 1, "world_size": world}
        made = [
            trial(method, tmp_path / f"{world}", **SHORT, **step, **without_dropout(method))
            for method in adapters.names()
        ]
        return [replace(request, pack_key=None) for request in made]

    alone = trained(requests(1), 0)
    together = of_two_ranks(trained, requests(2), tmp_path / "meeting")
    for method, one, two in zip(adapters.names(), alone, together, strict=True):
        assert two == pytest.approx(one, abs=1e-5), method


def test_ranks_of_which_one_is_told_to_stop_keep_the_same_step_and_go_on_to_the_same_bits(trial, tmp_path: Path):
    step = {"micro_batch_size": 1, "accumulation": 1, "world_size": 2}
    whole, cut = (trial("lora", tmp_path / place, **SHORT, **step) for place in ("whole", "cut"))
    assert of_two_ranks(stopped, [whole, cut], tmp_path / "meeting") == ["epoch-0000-step-000002"]
    ends = [TrialStore(Path(request.folder).parent).done(request.key) for request in (whole, cut)]
    assert ends[0].adapter_digest == ends[1].adapter_digest and ends[0].losses_digest == ends[1].losses_digest
