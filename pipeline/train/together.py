"""Trials that train together: one resident backbone, one forward and backward pass a step for all of them.

A trial alone is a pack of one; there is no other loop. Every trial keeps its own data order, optimiser, gradient clip,
schedule, epochs and end, so its losses are those of training alone, up to the rounding of sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from pipeline import adapters
from pipeline.adapters.base import WeightsAdapter, parts_of
from pipeline.adapters.pack import Pack
from pipeline.errors import WorkError
from pipeline.progress import say
from pipeline.records.epoch import TrialReport
from pipeline.train.capacity import Capacity
from pipeline.train.compiled import compiled_parts
from pipeline.train.packed import Losses, losses
from pipeline.train.resident import TEACHER_BYTES, Resident
from pipeline.train.run import Part, TrialRun
from pipeline.train.selection import select

Work = list[tuple[TrialRun, list[Part]]]  # one step's micro-batches by trial


class Together:
    """The pack of one process.

    Args:
        resident: the backbone.
        on_step: called after every step and every scored batch: the sign of life.
    """

    def __init__(self, resident: Resident, on_step: Callable[[], None]) -> None:
        self.resident, self.on_step = resident, on_step
        self.runs: list[TrialRun] = []
        self.max_rows: int | None = None  # of one forward pass, once the memory has run out
        self.capacity = Capacity(resident.device)

    def room(self) -> int:
        """Return how many trials may join those that are here."""
        return 0 if self.max_rows is not None else self.capacity.room(len(self.runs))

    def evict(self, key: str) -> None:
        """Drop a trial."""
        for run in [run for run in self.runs if run.config.key == key]:
            self.runs.remove(run)
            run.close()

    def advance(self) -> list[TrialReport]:
        """Train until a trial completes an epoch, diverges, or turns out to be complete; return the reports.

        Raises:
            WorkError: one sample alone does not fit the memory.
        """
        closed = [run for run in self.runs if run.finished]
        if closed:
            return [self._report(run, run.closed_report()) for run in closed]
        steps = min(run.steps_left for run in self.runs)
        done, started, trials = 0, time.perf_counter(), len(self.runs)
        while done < steps and not any(run.error for run in self.runs):
            window = self._window(steps - done)
            # dropout is drawn in training alone
            learners = [run.adapter.train() for run in self.runs]
            with self._compiled(), adapters.attach(self.resident.loaded.model, learners) as pack:
                for work in window:
                    self._step(pack, work)
                    self.on_step()
                    done += 1
                    if any(run.error for run in self.runs):
                        break
        samples = done * sum(run.global_batch for run in self.runs)
        self.capacity.note(trials, samples, time.perf_counter() - started, done)
        diverged = [run for run in self.runs if run.error]
        ended = [run for run in self.runs if not run.error and run.steps_left == 0]
        reports = [self._report(run, run.diverged_report()) for run in diverged]
        if ended:
            started = time.perf_counter()
            selected = select(self.resident, ended, self.on_step)
            seconds = (time.perf_counter() - started) / len(ended)
            reports += [
                self._report(run, run.finish_epoch(found, seconds)) for run, found in zip(ended, selected, strict=True)
            ]
        return reports

    def _compiled(self) -> AbstractContextManager[None]:
        """Let the frozen parts run compiled, where it is asked for and the weights stay what they are."""
        updates = any(parts_of([run.adapter for run in self.runs], WeightsAdapter))
        if updates or not all(run.config.compile for run in self.runs):
            return nullcontext()
        return compiled_parts(self.resident.loaded.model, self.resident.forwards)

    def _report(self, run: TrialRun, report: TrialReport) -> TrialReport:
        if report.end is not None:
            self.evict(run.config.key)
        return report

    def _window(self, most: int) -> list[Work]:
        """Return the next steps' work; a teacher computes their targets while no adapter is attached."""
        window: list[Work] = []
        held = 0
        self.resident.kinds = {kind for run in self.runs for kind in run.kinds}
        while len(window) < most and held <= TEACHER_BYTES:
            work = [(run, run.parts(len(window))) for run in self.runs]
            held += sum(target.bytes for _, parts in work for part in parts for target in part.targets)
            window.append(work)
        return window

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self, pack: Pack, work: Work) -> None:
        """Run all trials' micro-batches and update every adapter; out of memory, in halves."""
        started = time.perf_counter()
        while True:
            try:
                sums = self._gradients(pack, work)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._halve(work)
        seconds = time.perf_counter() - started
        samples = [sum(len(part.ids) for part in parts) for _, parts in work]
        for (run, _), mine, count in zip(work, sums, samples, strict=True):
            run.packed = max(run.packed, len(work))
            run.finish_step(mine, seconds * count / sum(samples))

    def _gradients(self, pack: Pack, work: Work) -> list[dict[str, float]]:
        """Add up the gradients of one step; return each trial's losses."""
        self._seed(pack, work)
        sums: list[Losses] = [{} for _ in work]
        for micro in range(max(len(parts) for _, parts in work)):
            rows = [(n, run, parts[micro]) for n, (run, parts) in enumerate(work) if micro < len(parts)]
            for chunk in cut(rows, self.max_rows):
                for (number, *_), found in zip(chunk, self._backward(pack, chunk), strict=True):
                    for name, value in found.items():
                        sums[number][name] = sums[number][name] + value if name in sums[number] else value
        names = [(number, name) for number, mine in enumerate(sums) for name in mine]
        # one transfer a step: asking for each value would wait for the device each time
        values = torch.stack([sums[number][name].double() for number, name in names]).tolist()
        out: list[dict[str, float]] = [{} for _ in work]
        for (number, name), value in zip(names, values, strict=True):
            out[number][name] = value
        return out

    def _seed(self, pack: Pack, work: Work) -> None:
        """Draw dropout as a function of trial, step and rank: the same after a resume, and in a pack as alone."""
        if len(work) == 1:
            # as `torch.manual_seed` does, which formats three stack traces a call for devices that are not there
            for generator in (torch.default_generator, *torch.cuda.default_generators):
                generator.manual_seed(work[0][0].step_seed)
            return
        pack.seed({number: run.step_seed for number, (run, _) in enumerate(work)})

    def _backward(self, pack: Pack, chunk: list[tuple[int, TrialRun, Part]]) -> list[Losses]:
        """Forward and backward of one micro-batch."""
        if len(chunk) == 1:  # inside the engine's own forward, which may have to gather a sharded backbone
            _, run, part = chunk[0]
            seen: list[Losses] = []

            def work() -> torch.Tensor:
                seen.extend(losses(self.resident, pack, chunk))
                return seen[0]["train_loss"]

            run.engine.backward(run.engine.forward(work), last=part.last)
        else:
            seen = losses(self.resident, pack, chunk)
            tied = [
                run.engine.tied(mine["train_loss"], last=part.last)
                for (_, run, part), mine in zip(chunk, seen, strict=True)
            ]
            torch.stack(tied).sum().backward()
        return [{name: value.detach() for name, value in mine.items()} for mine in seen]

    def _halve(self, work: Work) -> None:
        """Go back to before the step, and from now on give the model half as many rows at once.

        Raises:
            WorkError: there is nothing to halve, or an engine has reduced gradients already.
        """
        rows = self.max_rows or max(
            sum(len(parts[micro].ids) for _, parts in work if micro < len(parts))
            for micro in range(max(len(parts) for _, parts in work))
        )
        if rows == 1:
            raise WorkError(
                "one sample alone does not fit the memory",
                where=work[0][0].config.key,
                way_out="Use a larger device, a lower precision, or train.offload: cpu with train.zero_stage: 3",
            )
        for run, _ in work:
            run.engine.forget()
        self.max_rows = -(-rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory with {rows} rows in one pass: from now on at most {self.max_rows}; no step is lost")


def cut(rows: list[tuple[int, TrialRun, Part]], most: int | None) -> list[list[tuple[int, TrialRun, Part]]]:
    """Cut one micro-batch of a pack into pieces of at most `most` samples; a trial's samples may be cut too."""
    if most is None:
        return [rows]
    pieces: list[list[tuple[int, TrialRun, Part]]] = [[]]
    room = most
    for number, run, part in rows:
        at = 0
        while at < len(part.ids):
            if room == 0:
                pieces.append([])
                room = most
            end = min(len(part.ids), at + room)
            last = part.last and end == len(part.ids)
            pieces[-1].append((number, run, Part(part.ids[at:end], part.targets[at:end], part.weight, last)))
            room -= end - at
            at = end
    return pieces


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: CUDA has a type for it, the CPU's allocator only a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
