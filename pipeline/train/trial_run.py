"""One trial in training: data order, adapter, engine, epochs, and what is kept. `train.loop` runs the steps."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipeline import adapters, methods
from pipeline.adapters.base import WEIGHTS_FILE
from pipeline.config.trial import Kind, TrialConfig
from pipeline.core.errors import InputError, WorkError
from pipeline.core.files import folder_atomic, folder_digest, remove_folder
from pipeline.core.plain_yaml import Json
from pipeline.data.manifest import Manifest, training_samples
from pipeline.data.sample import Sample
from pipeline.prompts.prompt import Encoded, shared_prefix_length, template_of
from pipeline.records.store import WRITING, TrialFolder
from pipeline.records.trial import (
    AGAIN,
    Best,
    CheckpointState,
    ComparedLoss,
    EpochReport,
    EpochSoFar,
    Status,
    TrialReport,
)
from pipeline.resident.resident import Resident, Target
from pipeline.tasks import of_manifest
from pipeline.train import checkpoint
from pipeline.train.cost import Memory, flops_per_sample
from pipeline.train.engine import ENGINES, Student
from pipeline.train.teacher import Demonstrations, Teacher

_WINDOW = 0.1  # of an epoch: the steps over which the loss is averaged by which trials are compared


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one trial that go through the model together.

    Attributes:
        trial: whose they are.
        number: of its adapter in the pack.
        ids: numbers of the trial's training samples.
        weight: one sample's share of the global batch's mean.
        last: whether this is the trial's last micro-batch before its optimiser steps.
        targets: its teacher's, one a sample; none without a teacher.
    """

    trial: TrialRun
    number: int
    ids: list[int]
    weight: float
    last: bool
    targets: Sequence[Target] = ()

    @property
    def samples(self) -> list[Sample]:
        """The samples."""
        return [self.trial.samples[i] for i in self.ids]

    @property
    def prompts(self) -> list[Encoded]:
        """Their prompts, without demonstrations."""
        return [self.trial.prompts[i] for i in self.ids]


@dataclass
class _Epoch:
    """What an epoch has added up so far."""

    order: list[list[int]]
    sums: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # of each step
    ground_truth: list[float] = field(default_factory=list)  # the cross-entropy alone, unweighted
    steps: int = 0
    gradient_norm: float = 0.0
    learning_rate_scale: float = 0.0
    seconds: float = 0.0


class TrialRun:
    """The state of one trial on a resident backbone.

    Args:
        config: the trial.
        folder: its folder in the store.
        resident: the backbone.
        manifest: the task's samples.
        kinds: of teacher's targets that trials with the same demonstrations will ask for, here or later.
        keep_seconds: after so long the state is kept within an epoch (`due`); 0: only at its end.
        compared_after: points, in epochs, at which the trial stops to be compared with others of its search.
    """

    _starts = False  # whether the adapter starts from demonstrations

    def __init__(
        self, config: TrialConfig, folder: Path, resident: Resident, manifest: Manifest, kinds: Collection[Kind] = (),
        keep_seconds: float = 0.0, compared_after: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.config, self.resident, self.manifest = config, resident, manifest
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.world != config.world_size:
            raise WorkError(
                f"the trial asks for {config.world_size} ranks, this slot has {self.world}", where=config.key
            )
        self.folder = self._taken(TrialFolder(folder))
        self._go_on_from_parent()
        self.task = of_manifest(manifest)
        self.samples = training_samples(manifest, config)
        split = "evaluation" if config.selection == "test" else "selection"
        # the papers choose on the whole test split
        self.selection = manifest.splits[split][: None if config.selection == "test" else config.num_selection_samples]
        self.prompts = resident.alone(manifest, self.samples, answer=True)
        # what all of them begin with, an instruction, is computed once a step where that pays
        self.prefix_length = shared_prefix_length(
            [prompt.input_ids for prompt in self.prompts], resident.loaded.image_token_id
        )
        self.shortest = min(map(len, self.prompts))  # the fewest tokens of a pass
        options, model = methods.options(config), resident.loaded.model
        self.facts = options.facts()
        self.adapter = adapters.make(config.method, model, options, seed=config.seed)
        self.adapter.to(resident.device)
        self._starts = self.facts.starts
        started = self._start()
        self.kinds: set[Kind] = set(kinds) if self.facts.kind is None else {*kinds, self.facts.kind}
        self.teacher = Teacher(resident, manifest, self.samples, config, self.facts) if self.facts.teacher else None
        self.flops = flops_per_sample(
            self.adapter, resident, self.prompts, self.prefix_length, manifest, config.num_shots
        )
        self.memory = Memory(model, resident.device)
        self.trainable = self.adapter.num_trainable()  # before ZeRO takes the parameters apart
        student = Student(self.adapter, model if config.zero_stage == 3 else None)
        groups = self.adapter.parameter_groups(config.learning_rate, config.weight_decay)
        self.engine = ENGINES[config.engine](student, groups, config)
        self.global_batch = config.micro_batch_size * config.accumulation * self.world
        self.per_epoch = steps_per_epoch(len(self.samples), self.global_batch)
        self.reports: list[EpochReport] = []
        self.best: Best | None = None
        self.error: str | None = None  # why the trial diverged
        self.keeping = 0.0  # seconds spent on checkpoints and the ledger
        self.peak = 0  # bytes of memory
        self._kept = self.folder.adapter  # where the best epoch's adapter is
        self.exact = True  # whether all its sums were those that it has alone
        self.packed = 1  # most trials, this one included, that it has shared a forward pass with
        self.due = False  # whether it is time for a checkpoint within the epoch
        self.asked = self.leaving = False  # whether this rank was told to stop, and what the ranks have agreed on
        self._keep_seconds, self._kept_at = keep_seconds, time.monotonic()
        self._epoch = self._resume()
        self._epoch.seconds += started
        self._kept_step = self.step
        self._set_points(compared_after)

    @property
    def epochs_done(self) -> int:
        """Epochs that this trial has behind it."""
        return len(self.reports)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        return self.epochs_done >= self.config.epochs

    @property
    def epoch_number(self) -> int:
        """The epoch in progress, from 1."""
        return self.epochs_done + 1

    @property
    def steps_left(self) -> int:
        """Steps to the end of the epoch in progress."""
        return self.per_epoch - self._epoch.steps

    @property
    def steps_to_halt(self) -> int:
        """Steps to the next report: the end of the epoch, or a point at which the trial is compared before it."""
        return min([self.steps_left, *(step - self.step for step in self._points.values() if step > self.step)])

    # -- steps -------------------------------------------------------------------------------------------------------

    def micro_batches(self, number: int, *, ahead: int) -> list[MicroBatch]:
        """Return this rank's micro-batches, `ahead` steps from now; `number` is the adapter's in the pack."""
        config, epoch = self.config, self._epoch
        global_batch = epoch.order[epoch.steps + ahead]
        of_rank = micro_batches_of_rank(
            global_batch, micro_batch_size=config.micro_batch_size, world_size=self.world, rank=self.rank
        )
        micro_batches = []
        for index, ids in enumerate(of_rank):
            # a rank without a sample of a short last batch takes one without weight: all ranks run the same graph
            taken, weight = (ids, 1 / len(global_batch)) if ids else (global_batch[:1], 0.0)
            micro_batches.append(MicroBatch(self, number, taken, weight, last=index == len(of_rank) - 1))
        return micro_batches

    def add_seconds(self, seconds: float) -> None:
        """Count time that the epoch has taken."""
        self._epoch.seconds += seconds

    @property
    def step(self) -> int:
        """Number of the next step, from 0, over all epochs."""
        return self.epochs_done * self.per_epoch + self._epoch.steps

    @property
    def step_seed(self) -> int:
        """Seed of the next step's dropout: the same after a resume, another for every rank."""
        return (self.config.seed * 1_000_003 + self.step * 1_009 + self.rank) % (1 << 63)

    @property
    def learning_rate_scale(self) -> float:
        """The schedule's scale on the learning rate at the next step."""
        return cosine_with_warmup(self.step, self.per_epoch * self.config.epochs, self.config.warmup_ratio)

    def finish_step(
        self, losses: dict[str, float], gradient_norm: float, seconds: float, *, pack_size: int, exact: bool
    ) -> None:
        """Take in a step by which the adapter has been updated.

        Args:
            losses: summed over the step's micro-batches.
            gradient_norm: before clipping.
            seconds: what the step took of the trial's share.
            pack_size: trials that shared the step, this one included.
            exact: whether its sums were those that the trial has alone.
        """
        epoch = self._epoch
        for name, value in losses.items():
            epoch.sums[name] = epoch.sums.get(name, 0.0) + value / self.per_epoch
        epoch.losses.append(losses["train_loss"])
        epoch.ground_truth.append(losses["ground_truth_loss"])
        epoch.gradient_norm, epoch.learning_rate_scale = gradient_norm, self.learning_rate_scale
        epoch.seconds += seconds
        self.packed, self.exact = max(self.packed, pack_size), self.exact and exact
        diverged, self.due, self.leaving = self._of_any_rank(
            not math.isfinite(losses["train_loss"]),
            0 < self._keep_seconds <= time.monotonic() - self._kept_at,
            self.asked,
        )  # fmt: skip
        if diverged:
            self.error = f"the loss is not finite at step {self.step + 1} (epoch {self.epoch_number})"
        epoch.steps += 1

    def _of_any_rank(self, *facts: bool) -> list[bool]:
        if self.world == 1:
            return list(facts)
        flags = torch.tensor(facts, dtype=torch.float32, device=self.resident.device)
        dist.all_reduce(flags)
        return [bool(flag) for flag in flags.tolist()]

    # -- epochs ------------------------------------------------------------------------------------------------------

    def finish_epoch(self, selected: dict[str, float], seconds: float) -> TrialReport:
        """Keep what the epoch has given: the report, the best epoch's adapter, a checkpoint; the last epoch's end.

        Args:
            selected: the selection set's score (or loss) and the `objective`, higher is better.
            seconds: what scoring took of the trial's share.
        """
        epoch, objective = self._epoch, selected["objective"]
        means = dict(zip(epoch.sums, self._over_ranks(list(epoch.sums.values())), strict=True))
        rate = self.config.learning_rate * epoch.learning_rate_scale
        last = {"gradient_norm": epoch.gradient_norm, "learning_rate": rate}
        took = {"seconds": epoch.seconds + seconds, "train_seconds": epoch.seconds}
        report = EpochReport.model_validate({"epoch": self.epoch_number, **means, **selected, **last, **took})
        if self.best is None or objective > self.best.objective:
            self.best = Best(epoch=self.epoch_number, objective=objective)
        self._compare()  # before its checkpoint, as `_save_losses`
        self.reports.append(report)
        self._save_losses(self._over_ranks(epoch.losses))
        self._save_checkpoint()
        self._epoch = self._next_epoch()
        return self._ended("finished") if self.finished else replace(self._report(), compared=self._tell())

    def diverged_report(self) -> TrialReport:
        """End a trial whose loss is not finite."""
        return self._ended("diverged", error=self.error)

    def closed_report(self) -> TrialReport:
        """Return the last report of a trial whose epochs are all behind it, and write its end again.

        A crash between the last checkpoint and done.json leads here.
        """
        return self._ended("finished")

    def close(self) -> None:
        """Free the engine, and leave the trial's folder to the next process."""
        self.engine.close()
        if self.rank == 0:
            self.folder.release()

    def _next_epoch(self) -> _Epoch:
        if self.finished:
            return _Epoch([])
        return _Epoch(global_batches(len(self.samples), self.global_batch, self.config.seed, self.epoch_number))

    def keep_step(self) -> None:
        """Keep the state within the epoch, unless no step was taken since it was kept (every rank calls it).

        A step that was not finite is not kept: what goes on from the one before ends there again.
        """
        if self.error is None and self.step != self._kept_step:
            self._compare()
            self._save_checkpoint(self._epoch.steps)

    # -- within a search ---------------------------------------------------------------------------------------------

    def _set_points(self, after: Sequence[float]) -> None:
        """Note at which steps the trial is compared, and what is known of those that are behind it."""
        total = self.per_epoch * self.config.epochs
        steps = {point: max(1, round(point * self.per_epoch)) for point in after}
        self._points = {point: step for point, step in steps.items() if step < total}
        known = {(loss.after, loss.step): loss for loss in self.folder.compared()} if self._points else {}
        behind = [ComparedLoss(after=point, step=step) for point, step in self._points.items() if step <= self.step]
        self._compared = {loss.after: known.get((loss.after, loss.step), loss) for loss in behind}
        self._told: set[float] = set()  # points that this process has reported

    @property
    def at_a_point(self) -> bool:
        """Whether the trial has just come to a point at which it is compared."""
        return any(step == self.step and point not in self._told for point, step in self._points.items())

    @property
    def is_untold(self) -> bool:
        """Whether nobody was told of a loss that the trial is compared by."""
        return not self._compared.keys() <= self._told

    def _compare(self) -> None:
        """Keep the losses at the points that the trial has just come to (every rank calls it).

        A point's loss is the mean cross-entropy of the answers over the last tenth of an epoch, or what of the epoch
        is behind the trial: what alignment and the weights add says nothing of which trial answers better.
        """
        points = [point for point, step in self._points.items() if step == self.step and point not in self._compared]
        if not points:
            return
        last = self._over_ranks(self._epoch.ground_truth[-max(1, round(_WINDOW * self.per_epoch)) :])
        loss = float(f"{sum(last) / len(last):.7g}") if last else None
        self._compared |= {point: ComparedLoss(after=point, step=self.step, loss=loss) for point in points}
        if self.rank == 0:
            self.folder.write_compared(self._compared.values())

    def _tell(self) -> tuple[ComparedLoss, ...]:
        new = tuple(loss for point, loss in self._compared.items() if point not in self._told)
        self._told.update(self._compared)
        return new

    def compared_report(self) -> TrialReport:
        """Report what the trial is compared by, at a point that it has come to, whose state is kept, and before."""
        self.keep_step()
        return TrialReport(self.config.key, self.epochs_done, compared=self._tell())

    def _over_ranks(self, values: list[float]) -> list[float]:
        """Add up what each rank's share has given."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        if self.resident.device != "cpu":
            total = total.to(self.resident.device)
        dist.all_reduce(total)
        return total.tolist()

    def _start(self) -> float:
        """Let the adapter start from demonstrations, or from its newest checkpoint; return the seconds that it took."""
        if not self._starts:
            return 0.0
        started = time.perf_counter()
        newest = checkpoint.newest(self.folder.checkpoint, self.folder.within)
        if newest is not None:
            self.adapter.read_weights(newest[0] / checkpoint.START / WEIGHTS_FILE)
            return 0.0  # counted when it was done
        self.adapter.start(Demonstrations(self.resident, self.manifest, self.samples, self.config))
        return time.perf_counter() - started

    # -- keeping -----------------------------------------------------------------------------------------------------

    def _go_on_from_parent(self) -> None:
        """Give a trial that has no checkpoint its parent's last one, and the curves until then.

        Raises:
            InputError: the parent has none.
        """
        folder, within, parent = self.folder.checkpoint, self.folder.within, self.config.parent
        if not parent:
            return
        if self.rank == 0 and checkpoint.newest(folder, within) is None:
            before = TrialFolder(self.folder.path.parent / parent)
            newest = checkpoint.newest(before.checkpoint)
            if newest is None:
                way_out = f"Train {parent} again, then this one"
                raise InputError("no checkpoint to go on from", where=str(before.checkpoint), way_out=way_out)
            path, state = newest
            for epoch, losses in before.losses().items():
                self.folder.add_losses(epoch, losses)
            with folder_atomic(checkpoint.place(folder, state.epoch), within) as temporary:
                shutil.copytree(path, temporary, dirs_exist_ok=True)
        if self.world > 1:
            dist.barrier()

    def _taken(self, folder: TrialFolder) -> TrialFolder:
        """Take the trial's folder up, for all ranks of this slot."""
        taken = folder.take() if self.rank == 0 else folder
        if self.world == 1:
            return taken
        name = taken.within.name if taken.within is not None else "0" * 32
        code = torch.tensor(list(bytes.fromhex(name)), dtype=torch.uint8, device=self.resident.device)
        dist.broadcast(code, 0)
        return TrialFolder(folder.path, folder.path / WRITING / bytes(code.tolist()).hex())

    def _write_adapter(self, target: Path) -> None:
        """Put the best epoch's adapter into a checkpoint: this epoch's, or the one that was kept before."""
        if self.best is None:
            return
        if self.best.epoch != self.epochs_done or (target / self._so_far).exists():
            shutil.copytree(self._kept, target / checkpoint.ADAPTER)
            return
        config = self.config
        extra: Json = {"trial": config.key, "task": config.task, "manifest": config.manifest_digest}
        extra |= {"backbone": config.backbone, "backbone_digest": config.backbone_digest}
        extra |= {"prompt": self.manifest.prompt, "precision": config.precision}
        if config.quantize != "none":
            extra["quantize"] = config.quantize
        extra["template"] = template_of(self.task.template, self.resident.loaded.backbone, self.manifest.prompt)
        if self.manifest.definition is not None:  # its prompt and score, which no code has
            extra["definition"] = self.manifest.definition
        self.adapter.save_pretrained(target / checkpoint.ADAPTER, extra=extra)

    def _settle(self) -> None:
        """Bring adapter/ and metrics.jsonl in line with the checkpoint, from which a crash may have kept them."""
        if self.rank > 0:
            return
        if self.best is None:
            remove_folder(self.folder.adapter, self.folder.within)
        elif self._kept != self.folder.adapter and folder_digest(self.folder.adapter) != self.best.adapter_digest:
            with folder_atomic(self.folder.adapter, self.folder.within) as temporary:
                shutil.copytree(self._kept, temporary, dirs_exist_ok=True)
                if self.best.adapter_digest not in (None, folder_digest(temporary)):
                    raise WorkError(f"the adapter of epoch {self.best.epoch} is damaged", where=str(self._kept))
        self.folder.write_epochs(self.reports)

    def _save_losses(self, losses: list[float]) -> None:
        """Keep the epoch's curve; before its checkpoint, so that no epoch that is kept lacks it."""
        if self.rank == 0:
            started = time.perf_counter()
            self.folder.add_losses(self.epochs_done, losses)
            self.keeping += time.perf_counter() - started

    @property
    def _state(self) -> CheckpointState:
        """What the trial has behind it."""
        return CheckpointState(
            epoch=self.epochs_done, rows=tuple(self.reports), best=self.best, packed=self.packed, exact=self.exact,
            keeping=self.keeping, peak=self.peak,
        )  # fmt: skip

    @property
    def _so_far(self) -> str:
        return f"so-far-rank{self.rank:04d}.json"

    def _save_checkpoint(self, step: int = 0) -> None:
        """Keep the state at the end of an epoch, or `step` steps after it."""
        started = time.perf_counter()
        self.peak = max(self.peak, self.memory.peak or 0)
        folder, within = self.folder.checkpoint, self.folder.within
        state = self._state

        def write(target: Path) -> None:
            self.engine.save(target)
            if step:
                epoch = self._epoch
                so_far = EpochSoFar(
                    steps=step, sums=epoch.sums, losses=tuple(epoch.losses), ground_truth=tuple(epoch.ground_truth),
                    gradient_norm=epoch.gradient_norm, learning_rate_scale=epoch.learning_rate_scale,
                    seconds=epoch.seconds,
                )  # fmt: skip
                (target / self._so_far).write_text(so_far.text(indent=None), encoding="utf-8")
            with self.engine.whole():
                if self.rank == 0:
                    self._write_adapter(target)
                    if self._starts:
                        self.adapter.save_pretrained(target / checkpoint.START)

        if self.world == 1 or within is None:
            state = checkpoint.save(folder, state, write, within, step)
        else:
            shared = checkpoint.place(within, state.epoch, step)
            shared.mkdir(exist_ok=True)
            write(shared)  # every rank its part
            dist.barrier()
            if self.rank == 0:
                state = checkpoint.save(
                    folder, state, lambda target: checkpoint.move_into(shared, target), within, step
                )
            dist.barrier()
        self.best = state.best
        self._kept = checkpoint.place(folder, state.epoch, step) / checkpoint.ADAPTER
        if not step:
            self._settle()
        self._kept_at, self._kept_step, self.due = time.monotonic(), self.epochs_done * self.per_epoch + step, False
        self.keeping += time.perf_counter() - started

    def _resume(self) -> _Epoch:
        """Go back to the newest checkpoint; return the epoch in progress."""
        epoch = None
        newest = checkpoint.newest(self.folder.checkpoint, self.folder.within)
        if newest is not None:
            path, state = newest
            self.engine.load(path)
            self.reports, self.best = list(state.rows), state.best
            self.packed, self.exact = state.packed, state.exact
            self.keeping, self.peak = state.keeping, state.peak
            if state.best is not None and state.best.adapter_digest is not None:  # else of before: adapter/ is all
                self._kept = path / checkpoint.ADAPTER
            if (path / self._so_far).exists():
                so_far = EpochSoFar.read(path / self._so_far, AGAIN)
                epoch = self._next_epoch()
                epoch.sums, epoch.losses, epoch.steps = dict(so_far.sums), list(so_far.losses), so_far.steps
                epoch.ground_truth = list(so_far.ground_truth)
                epoch.gradient_norm, epoch.learning_rate_scale = so_far.gradient_norm, so_far.learning_rate_scale
                epoch.seconds = so_far.seconds
        self._settle()
        if self.rank == 0:
            self.folder.forget_losses(after=self.epochs_done)
        return epoch or self._next_epoch()

    def _report(self, end: Status | None = None) -> TrialReport:
        """Return what there is to say of the trial's last epoch."""
        if end == "diverged":
            return TrialReport(self.config.key, self.epoch_number, end=end)
        return TrialReport(self.config.key, self.epochs_done, self.reports[-1], end)

    def _ended(self, status: Status, error: str | None = None) -> TrialReport:
        """Write the trial's end."""
        if self.rank == 0:
            self.folder.finish(
                self._state.end(
                    status, error=error, chosen_epoch=self.best.epoch if self.best else None,
                    objective=self.best.objective if self.best else None, trainable_parameters=self.trainable,
                    train_flops=self.flops and self.flops[0] * len(self.samples) * self.epochs_done + self.flops[1],
                )
            )  # fmt: skip
        return self._report(status)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Return the number of optimiser steps in an epoch; the last one may be smaller than the rest."""
    return math.ceil(num_samples / batch_size)


def cosine_with_warmup(step: int, total: int, warmup_ratio: float) -> float:
    """Return the scale on the learning rate at optimiser step `step` (0-based) of `total`.

    Linear from 0 over the first `warmup_ratio` of the steps, then half a cosine down to 0 (HiFICL Table 5).
    The first step already moves: it takes 1/warm-up of the rate, where a start at exactly 0 would waste it.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of `range(num_samples)` of one epoch, [num_samples].

    Philox is counter-based and its stream is fixed by numpy's stability policy, so the order is the same on every
    machine.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFF, epoch]))
    return generator.permutation(num_samples)


def global_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Split one epoch's order into global batches (over all ranks and accumulation steps)."""
    order = epoch_order(num_samples, seed, epoch).tolist()
    return [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]


def micro_batches_of_rank(
    global_batch: list[int], *, micro_batch_size: int, world_size: int, rank: int
) -> list[list[int]]:
    """Return the micro-batches of `rank` in a global batch.

    Samples are dealt to the ranks in turn, so that a short last batch is spread evenly. Every rank gets the same
    number of micro-batches (some may be empty), because the ranks must meet at the same collectives.
    """
    of_rank = global_batch[rank::world_size]
    longest = -(-len(global_batch) // world_size)
    count = max(1, -(-longest // micro_batch_size))
    return [of_rank[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]
