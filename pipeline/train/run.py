"""One trial in training: from its configuration to epoch reports, checkpoints and the chosen adapter."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import adapters, methods
from pipeline.atomic import folder_atomic, write_atomic
from pipeline.backbones.decoder import decoder_of
from pipeline.data.collate import Batch
from pipeline.data.manifest import Manifest
from pipeline.data.sample import Sample
from pipeline.errors import WorkError
from pipeline.evaluate.predict import predict
from pipeline.tasks import tasks
from pipeline.train import checkpoint, loss
from pipeline.train.engine import ENGINES, Student
from pipeline.train.optim import cosine_with_warmup, steps_per_epoch
from pipeline.train.order import batches, share_of
from pipeline.train.resident import Resident
from pipeline.train.teacher import Target, Teacher, recorded
from pipeline.trial import TrialConfig

SELECTION_BATCH = 32
TEACHER_BYTES = 1 << 29  # targets are computed ahead for as many steps as fit in this
Report = dict[str, Any]
Step = tuple[int, list[tuple[list[int], list[Target]]]]  # number in the epoch, and this rank's micro-batches


class Diverged(Exception):
    """A loss is not finite; the step is named."""


@dataclass(frozen=True)
class Share:
    """One micro-batch of this rank."""

    batch: Batch | None  # None: this rank has no sample of a short last batch
    targets: list[Target]
    weight: float  # one sample's share of the global batch's mean


class TrialRun:
    """Trains one trial on a resident backbone.

    Args:
        config: the trial.
        folder: its folder in the store.
        resident: the backbone.
        manifest: the task's samples.
        on_step: called after every step, with the number of samples seen.
    """

    def __init__(
        self, config: TrialConfig, folder: Path, resident: Resident, manifest: Manifest, on_step: Callable[[], None]
    ) -> None:
        self.config, self.folder, self.resident, self.manifest, self.on_step = (
            config,
            folder,
            resident,
            manifest,
            on_step,
        )
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.world != config.world_size:
            raise WorkError(
                f"the trial asks for {config.world_size} ranks, this slot has {self.world}", where=config.key
            )
        self.task = tasks.get(config.task)
        self.samples = manifest.splits["train"][: config.num_train_samples]
        split = "evaluation" if config.selection == "test" else "selection"
        # the papers choose on the whole test split
        self.selection = manifest.splits[split][: None if config.selection == "test" else config.num_selection_samples]
        self.prompts = resident.training_prompts(manifest, self.samples)
        self.facts = methods.facts_of(config.method, config.options)
        model = resident.loaded.model
        self.spec = decoder_of(model)
        self.adapter = adapters.create(config.method, model, seed=config.seed, **config.options)
        self.adapter.to(resident.device)
        self.pixels = self.facts.trains_vision
        self.teacher = (
            Teacher(resident, manifest, self.samples, config.num_shots, config.seed, self.facts)
            if self.facts.teacher else None
        )  # fmt: skip
        self.student = Student(self.adapter, self._loss, model if config.zero_stage == 3 else None)
        groups = self.adapter.parameter_groups(config.learning_rate, config.weight_decay)
        self.engine = ENGINES[config.engine](self.student, groups, config)
        self.global_batch = config.micro_batch_size * config.accumulation * self.world
        self.per_epoch = steps_per_epoch(len(self.samples), self.global_batch)
        self.rows: list[Report] = []
        self.best: dict[str, Any] = {}
        self._resume()

    @property
    def epochs_done(self) -> int:
        """Epochs that this trial has behind it."""
        return len(self.rows)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left."""
        return self.epochs_done >= self.config.epochs

    def epoch(self) -> Report:
        """Train one epoch, score the selection set, write the checkpoint; return the report.

        A loss that is not finite ends the trial; the report then says at which step.
        """
        number, started = self.epochs_done + 1, time.perf_counter()
        try:
            report = self._train_epoch(number)
        except Diverged as error:
            return self._finish({"epoch": number, "done": True}, "diverged", error=str(error))
        trained = time.perf_counter()
        report.update(self._select(number))
        report["seconds"], report["train_seconds"] = time.perf_counter() - started, trained - started
        self.rows.append(report)
        better = report["objective"] > self.best.get("objective", -math.inf)
        if better or not self.best:
            self.best = {"epoch": number, "objective": report["objective"]}
            self._save_adapter()
        state = {"rows": self.rows, "best": self.best}
        self._save_checkpoint(number, state)
        done = self.finished
        out = {**report, "done": done}
        return self._finish(out, "finished") if done else {**out, "trial_key": self.config.key}

    def closed_report(self) -> Report:
        """Return the last report of a trial whose epochs are all behind it, and write its end again.

        A crash between the last checkpoint and done.json leads here.
        """
        return self._finish({**self.rows[-1], "done": True}, "finished")

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    # -- one epoch ---------------------------------------------------------------------------------------------------

    def _train_epoch(self, number: int) -> Report:
        config = self.config
        total = self.per_epoch * config.epochs
        sums: dict[str, float] = {}
        first = (number - 1) * self.per_epoch
        order = batches(len(self.samples), self.global_batch, config.seed, number)
        norm = 0.0
        model, factor = self.resident.loaded.model, 0.0
        for group in self._groups(order, number):
            with adapters.attach(model, self.adapter):
                for offset, parts in group:
                    step = first + offset
                    torch.manual_seed(_step_seed(config.seed, step, self.rank))  # dropout: the same after a resume
                    shares = [self._share(ids, targets, 1 / len(order[offset])) for ids, targets in parts]
                    for index, share in enumerate(shares):
                        for name, value in self.engine.backward(share, last=index == len(shares) - 1).items():
                            sums[name] = sums.get(name, 0.0) + value / self.per_epoch
                    factor = cosine_with_warmup(step, total, config.warmup_ratio)
                    norm = self.engine.step(factor)
                    self._check_finite(sums, step)
                    self.on_step()
        return {"epoch": number, **self._over_ranks(sums), "gradient_norm": norm,
                "learning_rate": config.learning_rate * factor}  # fmt: skip

    def _check_finite(self, sums: dict[str, float], step: int) -> None:
        bad = not math.isfinite(sums.get("train_loss", 0.0))
        if self.world > 1:
            flag = torch.tensor(float(bad), device=self.resident.device)
            dist.all_reduce(flag)
            bad = bool(flag.item())
        if bad:
            raise Diverged(f"the loss is not finite at step {step + 1} (epoch {step // self.per_epoch + 1})")

    def _over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        if self.world == 1:
            return sums
        names = sorted(sums)
        values = torch.tensor([sums[name] for name in names], dtype=torch.float64)
        if self.resident.device != "cpu":
            values = values.to(self.resident.device)
        dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def _groups(self, order: list[list[int]], number: int) -> Iterator[list[Step]]:
        """Yield an epoch's steps in groups; a teacher computes a group's targets while no adapter is attached."""
        group: list[Step] = []
        held = 0
        for offset, whole in enumerate(order):
            mine = share_of(whole, micro_batch_size=self.config.micro_batch_size, world_size=self.world, rank=self.rank)
            parts = [(ids, self._targets(ids, number)) for ids in mine]
            group.append((offset, parts))
            held += sum(target.bytes for _, targets in parts for target in targets)
            if held > TEACHER_BYTES:
                yield group
                group, held = [], 0
        if group:
            yield group

    def _targets(self, ids: list[int], number: int) -> list[Target]:
        if self.teacher is None or not ids:
            return []
        return self.teacher.targets([self.samples[i] for i in ids], [self.prompts[i] for i in ids], number)

    def _share(self, ids: list[int], targets: list[Target], weight: float) -> Share:
        batch = None
        if ids:
            encoded = [self.prompts[i] for i in ids]
            batch = self.resident.batch(encoded, self.manifest, span=self.config.loss_span, pixels=self.pixels)
        return Share(batch, targets, weight)

    def _loss(self, share: Share) -> tuple[Tensor, dict[str, float]]:
        """Return this micro-batch's share of the global batch's mean loss, and its parts."""
        batch, config = share.batch, self.config
        if batch is None:
            return torch.zeros((), device=self.resident.device), {}
        loaded = self.resident.loaded
        hidden_wanted = self.facts.teacher == "hidden"
        context: AbstractContextManager[list[Tensor]] = (
            recorded(self.spec, self.facts.alignment) if hidden_wanted else nullcontext([])
        )
        with context as states:
            hidden = loaded.model.model(**batch.model_inputs(loaded), use_cache=False).last_hidden_state
        rows, positions, targets = loss.shifted(batch.labels)
        logits = loss.logits_at(loaded.model, hidden, rows, positions)
        truth = loss.cross_entropy(logits, targets, rows, len(batch)).sum() * share.weight
        total, parts = config.ground_truth_weight * truth, {"ground_truth_loss": truth.item()}
        if self.teacher is not None:
            imitation = self._imitation(batch, share.targets, states, logits, rows) * share.weight
            total = total + config.alignment_weight * imitation
            parts["alignment_loss"] = imitation.item()
        parts["train_loss"] = total.item()
        return total, parts

    def _imitation(
        self, batch: Batch, targets: list[Target], states: list[Tensor], logits: Tensor, rows: Tensor
    ) -> Tensor:
        if self.facts.teacher == "logits":
            taught = torch.cat([t.logits for t in targets if t.logits is not None])
            return loss.divergence(logits, taught, rows, len(batch)).sum()
        lengths = batch.lengths.tolist()
        spans = [(length - len(t.hidden[0]), length) for length, t in zip(lengths, targets, strict=True)]
        return loss.alignment(states, [t.hidden for t in targets], spans).sum()

    # -- selection -------------------------------------------------------------------------------------------------

    def _select(self, number: int) -> dict[str, float]:
        """Score the adapter on the split that chooses the epoch; every rank generates its part."""
        mine = self.selection[self.rank :: self.world]
        with adapters.attach(self.resident.loaded.model, self.adapter):
            if self.config.selection_metric == "loss":
                values = self._selection_losses(mine)
            else:
                texts = predict(self.resident, self.manifest, mine, from_pixels=self.pixels)
        if self.config.selection_metric == "loss":
            losses = self._gathered(values)
            mean = sum(losses.values()) / len(losses)
            return {"selection_loss": mean, "objective": -mean}
        score = self.task.score(self.selection, self._gathered(texts))
        return {"selection_score": score.value, "objective": score.value}

    def _gathered(self, mine: dict[Any, Any]) -> dict[Any, Any]:
        """Return all ranks' parts of a mapping by sample id."""
        if self.world == 1:
            return mine
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    @torch.no_grad()
    def _selection_losses(self, samples: Sequence[Sample]) -> dict[Any, float]:
        loaded = self.resident.loaded
        found: dict[Any, float] = {}
        encoded = self.resident.training_prompts(self.manifest, samples)
        for start in range(0, len(encoded), SELECTION_BATCH):
            rows_of = encoded[start : start + SELECTION_BATCH]
            batch = self.resident.batch(rows_of, self.manifest, span=self.config.loss_span, pixels=self.pixels)
            hidden = loaded.model.model(**batch.model_inputs(loaded), use_cache=False).last_hidden_state
            rows, positions, targets = loss.shifted(batch.labels)
            values = loss.cross_entropy(
                loss.logits_at(loaded.model, hidden, rows, positions), targets, rows, len(batch)
            )
            found.update(zip(batch.sample_ids, values.tolist(), strict=True))
        return found

    # -- keeping -----------------------------------------------------------------------------------------------------

    def _save_adapter(self) -> None:
        if self.rank == 0:
            config = self.config
            extra = {
                "trial": config.key, "task": config.task, "manifest": config.manifest_digest,
                "backbone": config.backbone, "backbone_digest": config.backbone_digest,
            }  # fmt: skip
            with folder_atomic(self.folder / "adapter") as temporary:
                self.adapter.save_pretrained(temporary, extra=extra)

    def _save_checkpoint(self, number: int, state: dict[str, Any]) -> None:
        folder = self.folder / "checkpoint"
        if self.world == 1:
            checkpoint.save(folder, number, state, self.engine.save)
        else:
            shared = folder / f".writing-{number}"
            self.engine.save(shared)  # every rank writes its part
            dist.barrier()
            if self.rank == 0:
                checkpoint.save(folder, number, state, lambda target: _move_into(shared, target))
            dist.barrier()
        if self.rank == 0:
            write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def _resume(self) -> None:
        found = checkpoint.newest(self.folder / "checkpoint")
        if found is None:
            return
        path, state = found
        self.engine.load(path)
        self.rows, self.best = state["rows"], state["best"]

    def _finish(self, report: Report, status: str, error: str | None = None) -> Report:
        record = {
            "status": status, "error": error, "epochs": self.epochs_done, "chosen_epoch": self.best.get("epoch"),
            "objective": self.best.get("objective"), "trainable_parameters": self.adapter.num_trainable(),
            "train_seconds": sum(row["train_seconds"] for row in self.rows),
            "seconds": sum(row["seconds"] for row in self.rows),
        }  # fmt: skip
        if self.rank == 0:
            write_atomic(self.folder / "done.json", json.dumps(record, indent=1, sort_keys=True))
        return {**report, "trial_key": self.config.key, "status": status}


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 1_009 + rank) % (1 << 63)


def _move_into(source: Path, target: Path) -> None:
    for entry in source.iterdir():
        os.replace(entry, target / entry.name)
    source.rmdir()
