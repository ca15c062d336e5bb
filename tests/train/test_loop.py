"""Trials that train together lose what they lose alone: losses, scores, ends; also when memory runs out on the way."""

from __future__ import annotations

import json
import math
import pickle
import random
import subprocess
import sys
import textwrap
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from pipeline.adapters.attach import attach
from pipeline.backbones import decoder
from pipeline.backbones.decoder import alike_from
from pipeline.records.store import TrialStore
from pipeline.records.trial import EpochReport
from pipeline.train.cost import Capacity
from pipeline.train.loop import TRAINING, TrainingLoop, cut
from pipeline.train.trial_run import MicroBatch, cosine_with_warmup
from pipeline.train.workbench import Workbench

MIXED = [
    ("hificl", {"rank": 2, "num_virtual_tokens": 3}),
    ("hificl", {"rank": 4, "learning_rate": 1e-2, "seed": 1, "epochs": 1}),
    ("hificl", {"lowrank_k": False, "alpha": "one", "task": "mini-coco"}),
    ("hificl", {"teacher": True, "loss_span": "sequence"}),
    ("mimic", {"shift": "linear", "micro_batch_size": 4, "accumulation": 1}),
    ("mimic", {"alignment": "attention", "num_train_samples": 9}),
    ("mimic", {"alignment": "attention", "point": "residual"}),
    ("mimic", {"point": "residual", "seed": 1}),
    ("live", {}),
    ("live", {"point": "residual"}),
]
LORAS = [
    ("lora", {"rank": 2}),
    ("hificl+lora", {"seed": 2}),
    ("lora", {"rank": 4, "seed": 1}),
    ("lora", {"dropout": 0.3, "task": "mini-coco"}),
]
PACKS = {"mixed": MIXED, "lora": LORAS}
FEW = {"num_train_samples": 12}  # three steps an epoch are enough to part ways in


def train(bench: Workbench, requests, *, double: bool = False) -> dict[str, list[EpochReport]]:
    """Train the requests together, adapters in fp64 where asked; return the metrics by trial and epoch."""
    for request in requests:
        bench.admit(request)
    for run in bench.loop.trials if double else ():
        run.adapter.double()
    reports: dict[str, list[EpochReport]] = {request.key: [] for request in requests}
    while bench.loop.trials:
        for report in bench.advance():
            reports[report.key].append(report.metrics)
    return reports


def gap(one, other) -> float:
    return max(abs(a.train_loss - b.train_loss) for key in one for a, b in zip(one[key], other[key], strict=True))


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(device="cpu")


def kept(folder, request) -> tuple:
    """Return all that a trial's numbers are: its losses, its reports without the seconds, its end and its adapter."""
    trial = TrialStore(folder).trial(request.key)
    reports = [
        {name: value for name, value in vars(report).items() if not name.endswith("seconds")}
        for report in trial.epochs()
    ]
    end = TrialStore(folder).done(request.key)
    return trial.losses(), reports, end.status, end.chosen_epoch, end.objective, end.adapter_digest


@pytest.mark.parametrize("name", PACKS)
def test_a_trial_has_the_same_bits_in_a_pack_as_alone(bench, trial, tmp_path, name):
    chosen = [(method, {**FEW, **given}) for method, given in PACKS[name]]
    for method, given in chosen:
        train(bench, [trial(method, tmp_path / "alone", **given)])
        bench.loop.resident.targets.clear()  # each computes its teacher's targets anew
    together = [trial(method, tmp_path / "together", **given) for method, given in chosen]
    train(bench, together)
    for request in together:
        assert kept(tmp_path / "together", request) == kept(tmp_path / "alone", request)
        end = TrialStore(tmp_path / "together").done(request.key)
        assert end.packed == len(together)
        assert end.exact is (name == "mixed")  # what a vision tower computes in company is not tried


@pytest.mark.parametrize("seed", range(4))
def test_the_bits_do_not_depend_on_who_joins_and_who_leaves(bench, trial, tmp_path, seed):
    """Trials of any methods, sizes and lengths, that come when the dice say so; some are evicted and come again."""
    dice = random.Random(seed)
    chosen = []
    for number, (method, given) in enumerate(dice.choices(LORAS if seed % 3 == 2 else MIXED, k=5)):
        changes = {"seed": number, "epochs": dice.choice((1, 2)), "num_train_samples": dice.choice((5, 9, 14))}
        changes |= {"micro_batch_size": dice.choice((1, 2, 5))}
        chosen.append((method, {**given, **changes}))
    for method, given in chosen:
        train(bench, [trial(method, tmp_path / "alone", **given)])
    requests = [trial(method, tmp_path / "together", **given) for method, given in chosen]
    waiting = list(requests)
    while waiting or bench.loop.trials:
        while waiting and (not bench.loop.trials or dice.random() < 0.5):
            bench.admit(waiting.pop())
        bench.advance()
        if bench.loop.trials and dice.random() < 0.3:  # a slot is lost: what is behind the last epoch comes again
            key = dice.choice(bench.loop.trials).config.key
            bench.evict(key)
            waiting.append(next(request for request in requests if request.key == key))
    for request in requests:
        assert kept(tmp_path / "together", request) == kept(tmp_path / "alone", request)


def test_where_rows_depend_on_their_company_trials_train_alone(trial, tmp_path, monkeypatch):
    bench = Workbench(device="cpu")
    bench.admit(trial("hificl", tmp_path))
    model = bench.loop.resident.loaded.model
    assert alike_from(model) < 24
    bench.loop.capacity.rates[1] = 1.0
    assert bench.loop.room() > 0
    monkeypatch.setattr(decoder, "_ALIKE", WeakKeyDictionary())
    plain = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: plain(self, x) + 1e-7 * x.shape[-2])
    assert alike_from(model) == math.inf
    assert bench.loop.room() == 0


def test_in_double_precision_a_pack_loses_the_same(trial, tmp_path, monkeypatch):
    def normed(norm, x):  # transformers' own goes through fp32, where a sum's last bit in fp64 may turn into one in 24
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    monkeypatch.setattr(MistralRMSNorm, "forward", normed)
    bench = Workbench(device="cpu")
    model = bench.resident(trial("hificl", tmp_path)).loaded.model.double()
    chosen = [(method, {**FEW, **given}) for method, given in MIXED if given.get("task") is None][:4]
    alone: dict = {}
    for method, given in chosen:
        alone |= train(bench, [trial(method, tmp_path / "alone", **given)], double=True)
    together = train(bench, [trial(method, tmp_path / "together", **given) for method, given in chosen], double=True)
    assert next(model.parameters()).dtype == torch.float64
    assert gap(alone, together) < 1e-12


def test_dropout_acts_in_training_alone(bench, trial, tmp_path):
    dry, wet = (trial("lora", tmp_path, dropout=p, epochs=1) for p in (0.0, 0.5))
    losses = [train(bench, [request])[request.key][0].train_loss for request in (dry, wet)]
    assert losses[0] != losses[1]
    bench.admit(wet)
    assert not any(run.adapter.training for run in bench.loop.trials)
    bench.evict(wet.key)


def test_trials_share_one_teacher_pass(bench, trial, tmp_path):
    seen = []

    def passes(*chosen) -> tuple[int, int]:
        """Train one epoch; return how often the backbone ran as a teacher (without a gradient) and as a student."""
        bench.loop.resident.targets.clear()
        folder, seen[:] = tmp_path / str(len(chosen)), []
        train(bench, [trial(method, folder, epochs=1, selection_metric="loss", **given) for method, given in chosen])
        return seen.count(False), seen.count(True)

    train(bench, [trial("mimic", tmp_path / "first", epochs=1)])
    model = bench.loop.resident.loaded.model.model
    hook = model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    one = passes(("mimic", {}))
    all_kinds = [("mimic", {}), ("mimic", {"shift": "linear"}), ("mimic", {"alignment": "attention"}), ("live", {})]
    four = passes(*all_kinds)
    hook.remove()
    # 5 steps of two micro-batches; the loss on the selection split is a pass of each trial's own
    assert one == (10 + 1, 10)
    assert four == (10 + 4, 10)


def test_a_teachers_pass_serves_trials_that_come_later_and_changes_nothing(bench, trial, tmp_path):
    def teacher_passes(request) -> tuple[int, list[dict]]:
        seen = []
        hook = bench.loop.resident.loaded.model.model.register_forward_hook(lambda *_: seen.append(1))
        reports = train(bench, [request])[request.key]
        hook.remove()
        return len(seen), reports

    mimic, live = (trial(method, tmp_path / method, epochs=1) for method in ("mimic", "live"))
    kinds = (("hidden", "mlp"), ("logits", ""))
    train(bench, [trial("mimic", tmp_path / "first", epochs=1)])
    bench.loop.resident.targets.clear()
    alone, lost_alone = teacher_passes(live)
    bench.loop.resident.targets.clear()
    train(bench, [replace(mimic, kinds=kinds)])
    behind, lost_behind = teacher_passes(replace(live, folder=str(tmp_path / "behind")))
    assert alone - behind == 10  # a pass for each of 5 steps' two micro-batches
    assert lost_behind[0].train_loss == lost_alone[0].train_loss


def test_a_step_cut_in_pieces_is_the_same_step(bench, trial, tmp_path):
    requests = [trial("hificl", tmp_path / "whole", rank=rank) for rank in (1, 2)]
    whole = train(bench, requests)
    bench.loop.passes.most[TRAINING] = 3
    try:
        pieces = train(bench, [trial("hificl", tmp_path / "pieces", rank=rank) for rank in (1, 2)])
    finally:
        del bench.loop.passes.most[TRAINING]
    assert gap(whole, pieces) < 1e-6


@pytest.mark.parametrize("drops", [False, True], ids=["a row a trial", "a row a sample"])
@pytest.mark.parametrize("max_rows", [None, 3])
def test_every_row_is_computed_with_its_own_trials_adapter(bench, trial, tmp_path, monkeypatch, drops, max_rows):
    if drops:  # as dropout does: no shared prefix
        monkeypatch.setattr(TrainingLoop, "_prefix_layout", lambda *_: None)
    chosen = [("hificl", {}), ("live", {}), ("hificl", {"task": "mini-coco"}), ("mimic", {}), ("mimic", {"seed": 1})]
    requests = [trial(method, tmp_path, micro_batch_size=2 + i, **given) for i, (method, given) in enumerate(chosen)]
    for request in requests:
        bench.admit(request)
    generator = torch.Generator().manual_seed(3)
    for run in bench.loop.trials:  # so far apart that a row with another's adapter cannot pass for one with its own
        for parameter in run.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    (step,) = bench.loop.next_steps(1)
    model = bench.loop.resident.loaded.model
    together = []
    with torch.no_grad(), attach(model, [run.adapter for run in bench.loop.trials]) as pack:
        for chunk in cut([micro_batches[0] for micro_batches in step], max_rows):
            together += list(zip(chunk, bench.loop.losses(pack, chunk), strict=True))
    for part, losses in together:
        with torch.no_grad(), attach(model, part.trial.adapter) as pack:
            (alone,) = bench.loop.losses(pack, [replace(part, number=0)])
        assert {name: value.item() for name, value in losses.items()} == pytest.approx(
            {name: value.item() for name, value in alone.items()}, rel=1e-4
        )
    for request in requests:
        bench.evict(request.key)


def test_every_step_is_taken_at_the_schedules_learning_rate(bench, trial, tmp_path):
    options = [{"learning_rate": 1e-2, "epochs": 2}, {"learning_rate": 3e-3, "warmup_ratio": 0.5}]
    requests = [trial("mimic", tmp_path, num_train_samples=12, **given) for given in options]
    rates: dict[str, list[float]] = {request.key: [] for request in requests}

    def noting(run, step):
        def note(scale: float) -> float:
            norm = step(scale)
            rates[run.config.key].append(run.engine.optimizer.param_groups[0]["lr"])
            return norm

        return note

    for request in requests:
        bench.admit(request)
    for run in bench.loop.trials:
        run.engine.step = noting(run, run.engine.step)
    while bench.advance():
        pass
    for request in requests:
        config = request.config
        total = 3 * config.epochs
        scales = [cosine_with_warmup(step, total, config.warmup_ratio) for step in range(total)]
        assert rates[request.key] == [config.learning_rate * scale for scale in scales]


def test_chunks_hold_every_sample_once():
    parts = [MicroBatch(None, 0, [1, 2, 3], 0.5, last=True), MicroBatch(None, 1, [4], 1.0, last=False)]
    assert [[(part.number, part.ids, part.last) for part in chunk] for chunk in cut(parts, 2)] == [
        [(0, [1, 2], False)],
        [(0, [3], True), (1, [4], False)],
    ]


def test_memory_that_runs_out_halves_the_rows_and_loses_no_step(trial, tmp_path):
    """The address space is limited for real, in a process of its own, once a small trial has run there."""
    request = trial("hificl", tmp_path / "whole", micro_batch_size=20, accumulation=1)
    bench = Workbench(device="cpu")
    whole = train(bench, [request])[request.key]
    small = trial("hificl", tmp_path / "small", micro_batch_size=1, accumulation=1, epochs=1, num_train_samples=2)
    limited = trial("hificl", tmp_path / "limited", micro_batch_size=20, accumulation=1)
    script = tmp_path / "limited.py"
    script.write_text(
        textwrap.dedent("""
        import json, pickle, resource, sys
        import torch
        from pipeline.train.workbench import Workbench
        torch.set_num_threads(1)
        small, limited = pickle.load(open(sys.argv[1], "rb"))
        bench = Workbench(device="cpu")
        for request in (small, limited):
            bench.admit(request)
            if request is limited:  # until the first step is done
                free, again = resource.getrlimit(resource.RLIMIT_AS), bench.loop.on_step
                bench.loop.on_step = lambda: (again(), resource.setrlimit(resource.RLIMIT_AS, free))
                pages = int(open("/proc/self/statm").read().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[2]), free[1]))
            lost = []
            while bench.loop.trials:
                lost += [report.metrics.train_loss for report in bench.advance()]
        print(json.dumps([bench.loop.max_rows, lost]))
    """)
    )
    (tmp_path / "requests").write_bytes(pickle.dumps((small, limited)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "requests"), str(4 << 20)], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows, lost = json.loads(done.stdout.splitlines()[-1])
    assert rows is not None and rows < 20 and "out of memory" in done.stderr
    assert lost == pytest.approx([r.train_loss for r in whole], abs=1e-5)


def test_a_pack_grows_while_that_pays():
    capacity = Capacity("cpu")
    assert capacity.room(1) == 0  # measure first
    assert capacity.why == "1 are tried; samples a second by trials in one pass: none yet"
    capacity.note(1, 100, 1.0, 10)
    assert capacity.best() == 2 and capacity.room(1) == 1
    assert capacity.why == "2 are tried; samples a second by trials in one pass: 1: 100"
    capacity.note(2, 100, 0.8, 10)
    assert capacity.best() == 4
    capacity.note(4, 100, 0.79, 10)
    assert capacity.best() == 2 and capacity.room(4) == 0
    assert capacity.why.startswith("2, for 4 bring 1.01 times as many, and 1.05 are asked; samples a second")
    capacity.note(4, 100, 0.5, 10)
    assert capacity.why == "4 are the most; samples a second by trials in one pass: 1: 100, 2: 125, 4: 200"


BASELINES = [
    ("peft", {"tuner": "dora", "config": {"r": 4}}),
    ("peft", {"tuner": "oft", "teacher": True}),
    ("prefix", {"teacher": "logits"}),
    ("prompt", {"teacher": True, "point": "attention"}),
    ("bottleneck", {}),
    ("m2iv", {}),
    ("ct-kv", {}),
    ("i2cl", {}),
    ("moe-hificl", {"experts": 2}),
    ("connector", {"learning_rate": 1e-4}),
]


@pytest.mark.parametrize(("method", "given"), BASELINES, ids=str)
def test_a_baseline_learns_in_a_trial_like_any_other(bench, trial, tmp_path, method, given):
    request = trial(method, tmp_path, **{"learning_rate": 2e-3, **given})
    (reports,) = train(bench, [request]).values()
    assert len(reports) == 2 and reports[1].ground_truth_loss < reports[0].ground_truth_loss
    assert TrialStore(tmp_path).done(request.key).status == "finished"
