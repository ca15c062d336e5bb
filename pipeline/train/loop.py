"""The training loop: one resident backbone, one forward and one backward pass a step for all trials of a pack.

A trial alone is a pack of one; there is no other loop. Every trial keeps its own data order, optimiser, gradient clip,
schedule, epochs and end, so its losses are those of training alone, up to the rounding of sums.

The methods stand in the order of execution: the next steps' data and teacher's targets, one step, its gradients, the
backward pass of one forward pass, its losses, the way out of memory, the end of an epoch; then what students are
compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from pipeline import adapters
from pipeline.adapters.base import WeightsAdapter, parts_of
from pipeline.adapters.pack import Pack, PackRows
from pipeline.backbones.base import placed
from pipeline.backbones.decoder import (
    DecoderSpec,
    alike_from,
    checkpointed_layers,
    compiled_parts,
    decoder_of,
    told,
)
from pipeline.backbones.passes import is_out_of_memory
from pipeline.backbones.states import recorded
from pipeline.config.trial import State
from pipeline.prompts.collate import Batch
from pipeline.records.trial import TrialReport
from pipeline.resident.resident import TEACHER_BYTES, Resident
from pipeline.train import loss
from pipeline.train.cost import Capacity
from pipeline.train.prefix_sharing import PrefixLayout, row_pays, sharing_prefix
from pipeline.train.selection import select
from pipeline.train.trial_run import MicroBatch, TrialRun

Step = list[list[MicroBatch]]  # each trial's micro-batches, up to the next update of its adapter
TRAINING = "training"
Losses = dict[str, Tensor]  # "train_loss" and its parts, scalars
_NORM = "gradient_norm"


class TrainingLoop:
    """Trains the pack of one process.

    Args:
        resident: the backbone.
        on_step: called after every step, teacher's pass and scored batch: the sign of life.
    """

    def __init__(self, resident: Resident, on_step: Callable[[], None]) -> None:
        self.resident, self.on_step = resident, on_step
        self.trials: list[TrialRun] = []
        self.passes = resident.loaded.passes
        self.capacity = Capacity(resident.device)
        self._alike = False  # whether each trial's sums are its own, whoever shares the pass

    @property
    def max_rows(self) -> int | None:
        """Of one forward pass in training, once the memory has run out."""
        return self.passes.most.get(TRAINING)

    @property
    def exact(self) -> bool:
        """Whether every trial has the bits that it has alone: on a CPU, and where nothing may depend on chance."""
        return self.resident.device == "cpu" or any(trial.config.deterministic for trial in self.trials)

    def room(self) -> int:
        """Return how many trials may join those that are here."""
        if self.max_rows is not None or (self.exact and not self._packs_exactly()):
            return 0
        return self.capacity.room(len(self.trials))

    @property
    def why_room(self) -> str:
        """Why no more, or so many more, trials may join."""
        if self.max_rows is not None:
            return f"no more: the memory holds {self.max_rows} rows"
        if self.exact and not self._packs_exactly():
            return "1: in a pack a trial would not have the bits that it has alone"
        return self.capacity.why

    def _packs_exactly(self) -> bool:
        """Whether the frozen modules give a trial's rows the same bits, whoever shares the pass."""
        if any(trial.facts.trains_vision or trial.config.compile for trial in self.trials):
            return False
        return all(trial.shortest >= alike_from(self.resident.loaded.model) for trial in self.trials)

    def evict(self, key: str) -> None:
        """Drop a trial."""
        for trial in [trial for trial in self.trials if trial.config.key == key]:
            self.trials.remove(trial)
            trial.close()

    def advance(self) -> list[TrialReport]:
        """Train until a trial completes an epoch, diverges or is to be compared, or is all that already; report it.

        Raises:
            WorkError: one sample alone does not fit the memory.
        """
        if untold := [trial for trial in self.trials if trial.is_untold]:
            return [trial.compared_report() for trial in untold]
        complete = [trial for trial in self.trials if trial.finished]
        if complete:
            return [self._let_go(trial, trial.closed_report()) for trial in complete]
        num_steps = min(trial.steps_to_halt for trial in self.trials)
        for trial in self.trials:
            trial.memory.note()
        self.capacity.begin()
        self._alike = self.exact and self._packs_exactly()  # asked of the backbone while nothing is attached
        done, started, pack_size = 0, time.perf_counter(), len(self.trials)
        while done < num_steps and not self._diverged():
            window = self.next_steps(num_steps - done)
            # dropout is drawn in training alone
            pack = Pack([trial.adapter.train() for trial in self.trials], apart=self.exact)
            with self._compiled(), self._checkpointed(), adapters.attach(self.resident.loaded.model, pack):
                for number, step in enumerate(window):
                    self._make_ready(window[number : number + 2])
                    self._step(pack, step)
                    self.on_step()
                    self.keep(trial for trial in self.trials if trial.due)
                    done += 1
                    if self._diverged():
                        break
        self.resident.visual.forget_ahead()
        samples = done * sum(trial.global_batch for trial in self.trials)
        self.capacity.note(pack_size, samples, time.perf_counter() - started, done)
        return self._end_epoch()

    def keep(self, trials: Iterable[TrialRun]) -> None:
        """Keep the state of trials between two steps of an epoch."""
        for trial in trials:
            trial.keep_step()

    def _diverged(self) -> list[TrialRun]:
        return [trial for trial in self.trials if trial.error]

    def _compiled(self) -> AbstractContextManager[None]:
        """Let the frozen parts run compiled, where it is asked for and the weights stay what they are."""
        updates = any(parts_of([trial.adapter for trial in self.trials], WeightsAdapter))
        if updates or not all(trial.config.compile for trial in self.trials):
            return nullcontext()
        return compiled_parts(self.resident.loaded.model, self.resident.forwards)

    def _checkpointed(self) -> AbstractContextManager[None]:
        """Let the layers keep their inputs alone, where it is asked for (and so of a whole pack, `plan.pack_key`)."""
        asked = any(trial.config.gradient_checkpointing for trial in self.trials)
        return checkpointed_layers(self.resident.loaded.model) if asked else nullcontext()

    # -- the next steps' data ------------------------------------------------------------------------------------------

    def next_steps(self, most: int) -> list[Step]:
        """Return the next steps; no adapter is attached, so the teachers compute what their students imitate.

        Args:
            most: steps; fewer where the targets would fill the memory.
        """
        window: list[Step] = []
        held = 0
        self.resident.kinds = {kind for trial in self.trials for kind in trial.kinds}
        while len(window) < most and held <= TEACHER_BYTES:
            step: Step = []
            for number, trial in enumerate(self.trials):
                started = time.perf_counter()
                micro_batches = trial.micro_batches(number, ahead=len(window))
                if trial.teacher is not None:
                    micro_batches = [
                        replace(part, targets=trial.teacher.targets(part.samples, part.prompts, trial.epoch_number))
                        for part in micro_batches
                    ]
                trial.add_seconds(time.perf_counter() - started)  # a teacher is a part of what training costs
                if trial.teacher is not None:
                    self.on_step()
                held += sum(target.bytes for part in micro_batches for target in part.targets)
                step.append(micro_batches)
            held = max(self.passes.of_ranks(held))
            window.append(step)
        return window

    def _make_ready(self, steps: Sequence[Step]) -> None:
        """Let pictures of the steps be decoded beside what the GPU computes."""
        for part in (part for step in steps for micro_batches in step for part in micro_batches):
            images, root = [image for prompt in part.prompts for image in prompt.images], part.trial.manifest.image_root
            self.resident.visual.ahead(images, root, pixels=part.trial.facts.trains_vision)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self, pack: Pack, step: Step) -> None:
        """Run all trials' micro-batches, then clip and update each adapter at its own learning rate."""
        started = time.perf_counter()
        while True:
            try:
                losses = self._gradients(pack, step)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._halve_rows(step)  # and again, from the step's beginning
        for trial, of_trial in zip(self.trials, losses, strict=True):
            of_trial[_NORM] = trial.engine.step(trial.learning_rate_scale)
        # one transfer a step: asking for each value would wait for the device each time
        values = iter(torch.stack([value.double() for of_trial in losses for value in of_trial.values()]).tolist())
        seconds = time.perf_counter() - started
        exact = self.max_rows is None and (len(step) == 1 or self._alike)
        samples = [sum(len(part.ids) for part in micro_batches) for micro_batches in step]
        for trial, of_trial, count in zip(self.trials, losses, samples, strict=True):
            known = {name: next(values) for name in of_trial}
            norm = known.pop(_NORM)
            trial.finish_step(known, norm, seconds * count / sum(samples), pack_size=len(step), exact=exact)

    def _gradients(self, pack: Pack, step: Step) -> list[Losses]:
        """Add up the gradients of one step; return each trial's losses."""
        self._seed_dropout(pack, step)
        sums: list[Losses] = [{} for _ in step]
        for index in range(max(map(len, step))):
            micro_batch = [micro_batches[index] for micro_batches in step if index < len(micro_batches)]
            for chunk in self._chunks(micro_batch):
                for part, losses in zip(chunk, self._backward(pack, chunk), strict=True):
                    total = sums[part.number]
                    for name, value in losses.items():
                        total[name] = total[name] + value if name in total else value
        return sums

    def _chunks(self, micro_batch: Sequence[MicroBatch]) -> list[list[MicroBatch]]:
        """Return which samples share a forward pass: what memory holds, trials whose samples share rows apart."""
        alike: dict[bool, list[MicroBatch]] = {}
        for part in micro_batch:
            alike.setdefault(self._shares_prefix(part), []).append(part)
        return [chunk for parts in alike.values() for chunk in cut(parts, self.max_rows)]

    def _seed_dropout(self, pack: Pack, step: Step) -> None:
        """Draw dropout as a function of trial, step and rank: the same after a resume, and in a pack as alone."""
        if len(step) > 1:
            pack.seed({number: trial.step_seed for number, trial in enumerate(self.trials)})
            return
        # as `torch.manual_seed` does, which formats three stack traces a call for devices that are not there
        for generator in (torch.default_generator, *torch.cuda.default_generators):
            generator.manual_seed(self.trials[0].step_seed)

    def _backward(self, pack: Pack, chunk: list[MicroBatch]) -> list[Losses]:
        """Run one forward and one backward pass; return the losses of each part of the chunk."""
        if len(chunk) == 1:  # inside the engine's own forward, which may have to gather a sharded backbone
            part = chunk[0]
            losses: list[Losses] = []

            def forward() -> Tensor:
                losses.extend(self.losses(pack, chunk))
                return losses[0]["train_loss"]

            engine = part.trial.engine
            engine.backward(engine.forward(forward), last=part.last)
        else:
            losses = self.losses(pack, chunk)
            scaled = [
                part.trial.engine.for_joint_backward(of_part["train_loss"])
                for part, of_part in zip(chunk, losses, strict=True)
            ]
            torch.stack(scaled).sum().backward()
        return [{name: value.detach() for name, value in of_part.items()} for of_part in losses]

    def losses(self, pack: Pack, chunk: Sequence[MicroBatch]) -> list[Losses]:
        """Run one forward pass; return each part's share of its global batch's mean loss, and what it consists of.

        Args:
            pack: the adapters, which are attached to the backbone.
            chunk: the samples, each trial's at most once.
        """
        model, spec = self.resident.loaded.model, decoder_of(self.resident.loaded.model)
        batch = self._batch(chunk)
        layout = self._prefix_layout(chunk, batch)
        pack.use(rows_of(chunk, batch, layout))
        imitation = Imitation(chunk, batch, layout)
        again = any(part.trial.config.gradient_checkpointing for part in chunk)
        with (
            told(self.resident.loaded.device, padded=False),
            imitation.recording(spec, again=again),
            sharing_prefix(spec, layout),
        ):
            hidden = model.model(**batch.model_inputs(self.resident.loaded), use_cache=False).last_hidden_state
        counts = [len(part.ids) for part in chunk]
        parts = zip(chunk, hidden.split(counts), batch.labels.split(counts), strict=True)
        return [self._loss(imitation, number, *of_part) for number, of_part in enumerate(parts)]

    def _loss(self, imitation: Imitation, number: int, part: MicroBatch, hidden: Tensor, labels: Tensor) -> Losses:
        """Return a part's loss, of its own samples' states [B, T, D] and labels [B, T], whoever shares the pass."""
        config = part.trial.config
        rows, positions, targets = (placed(x, hidden.device) for x in loss.shifted(labels))
        logits = loss.logits_at(self.resident.loaded.model, hidden, rows, positions)
        truth = loss.cross_entropy(logits, targets, rows, len(part.ids)).sum() * part.weight
        total, terms = config.ground_truth_weight * truth, {"ground_truth_loss": truth.detach()}
        if part.trial.teacher is not None:
            alignment = imitation.distance(number, logits, rows) * part.weight
            total = total + config.alignment_weight * alignment
            terms["alignment_loss"] = alignment.detach()
        return {"train_loss": total, **terms}

    def _batch(self, chunk: Sequence[MicroBatch]) -> Batch:
        manifests = [part.trial.manifest for part in chunk for _ in part.ids]
        one_root = len({manifest.image_root for manifest in manifests}) == 1
        return self.resident.batch(
            [prompt for part in chunk for prompt in part.prompts],
            manifests[0] if one_root else manifests,
            span=[part.trial.config.loss_span for part in chunk for _ in part.ids],
            pixels=chunk[0].trial.facts.trains_vision,
        )

    def _shares_prefix(self, part: MicroBatch) -> bool:
        """Whether a trial's samples stand in one row; whoever else is in the pack."""
        if not self.resident.loaded.family.shares_prefix or part.trial.facts.drops or len(part.ids) < 2:
            return False
        return row_pays([len(prompt) for prompt in part.prompts], part.trial.prefix_length)

    def _prefix_layout(self, chunk: Sequence[MicroBatch], batch: Batch) -> PrefixLayout | None:
        """Return how the decoder's rows share prefixes, or None where every sample has a row of its own."""
        if not self._shares_prefix(chunk[0]):
            return None
        lengths = iter(batch.lengths.tolist())  # which are the host's
        return PrefixLayout.of(
            [[next(lengths) for _ in part.ids] for part in chunk],
            [part.trial.prefix_length for part in chunk],
            batch.input_ids.shape[1],
            like=self.resident.loaded.model.get_input_embeddings().weight,
        )

    def _halve_rows(self, step: Step) -> None:
        """Go back to before the step, and from now on give the model half as many rows at once.

        Raises:
            WorkError: there is nothing to halve, or an engine has reduced gradients already.
        """
        rows = self.max_rows or max(
            sum(len(micro_batches[index].ids) for micro_batches in step if index < len(micro_batches))
            for index in range(max(map(len, step)))
        )
        for trial in self.trials:
            trial.engine.forget()
        self.passes.halve(TRAINING, rows, where=self.trials[0].config.key)

    # -- the end of an epoch -------------------------------------------------------------------------------------------

    def _end_epoch(self) -> list[TrialReport]:
        """Report who has diverged or is compared; score, keep and report the trials whose epoch is complete."""
        diverged = self._diverged()
        complete = [trial for trial in self.trials if not trial.error and trial.steps_left == 0]
        reports = [self._let_go(trial, trial.diverged_report()) for trial in diverged]
        within = [trial for trial in self.trials if not trial.error and trial.steps_left and trial.at_a_point]
        reports += [trial.compared_report() for trial in within]
        if complete:
            started = time.perf_counter()
            together = [[trial] for trial in complete] if self.exact else [complete]
            scores = [score for trials in together for score in select(self.resident, trials, self.on_step)]
            seconds = (time.perf_counter() - started) / len(complete)
            for trial, score in zip(complete, scores, strict=True):
                reports.append(self._let_go(trial, trial.finish_epoch(score, seconds)))
        return reports

    def _let_go(self, trial: TrialRun, report: TrialReport) -> TrialReport:
        """Drop a trial that has ended."""
        if report.end is not None:
            self.evict(trial.config.key)
        return report


class Imitation:
    """What the samples of one forward pass are compared with: their teachers' targets.

    Args:
        chunk: the samples, trial by trial.
        batch: of all of them.
        layout: where their tokens stand in the decoder's rows, if not in rows of their own.
    """

    def __init__(self, chunk: Sequence[MicroBatch], batch: Batch, layout: PrefixLayout | None) -> None:
        self.chunk = chunk
        self.states: dict[State, list[Tensor]] = {}  # the students', layer by layer, at the compared places
        self._spans: dict[int, slice] = {}  # of the places, by the number of a part in the chunk
        compared: dict[State, tuple[list[int], list[int]]] = {}  # the samples, and how many tokens of each
        first = 0
        for number, part in enumerate(chunk):
            counts = [target.hidden.shape[1] for target in part.targets if target.hidden is not None]
            if counts:
                samples, before = compared.setdefault(part.trial.facts.state, ([], []))
                self._spans[number] = slice(sum(before), sum(before) + sum(counts))
                samples += range(first, first + len(counts))
                before += counts
            first += len(part.ids)
        self._takes = {}
        for state, (samples, counts) in compared.items():
            ends = batch.lengths[samples].tolist()
            places = loss.tails(samples, ends, counts, batch.input_ids.shape[1], batch.input_ids.device)
            self._takes[state] = loss.at(places if layout is None else layout.where(places))

    @contextmanager
    def recording(self, spec: DecoderSpec, *, again: bool) -> Iterator[None]:
        """Record the students' states while the model runs.

        Args:
            spec: the decoder.
            again: layers are computed again in the backward pass, when nobody records: what is taken of a state is
                taken outside them.
        """
        with ExitStack() as stack:
            for state, take in self._takes.items():
                kept = recorded(spec, state) if again else recorded(spec, state, take)
                self.states[state] = stack.enter_context(kept)
            yield
        if again:
            self.states = {state: list(map(self._takes[state], whole)) for state, whole in self.states.items()}

    def distance(self, number: int, logits: Tensor, rows: Tensor) -> Tensor:
        """Return a taught part's distance to its teacher, summed over its samples.

        Args:
            number: of the part in the chunk.
            logits: the student's, of the answers' tokens, [N, V].
            rows: the sample of each of these, [N].
        """
        part = self.chunk[number]
        if part.trial.facts.teacher == "logits":
            taught = torch.cat([target.logits for target in part.targets if target.logits is not None])
            return loss.divergence(logits, taught, rows, len(part.ids)).sum()
        states = [of_layer[self._spans[number]] for of_layer in self.states[part.trial.facts.state]]
        return loss.alignment(states, [t.hidden for t in part.targets if t.hidden is not None]).sum()


def rows_of(chunk: Sequence[MicroBatch], batch: Batch, layout: PrefixLayout | None) -> PackRows:
    """Return which trial's adapter each of the decoder's rows uses: one row a sample, or one a trial (`layout`)."""
    if layout is None:
        numbers = tuple(part.number for part in chunk for _ in part.ids)
        widths = {part.number: max(map(len, part.prompts)) for part in chunk}
        return PackRows(numbers, batch.image_counts, widths)
    images = iter(batch.image_counts)
    numbers = tuple(part.number for part in chunk)
    counts = tuple(sum(next(images) for _ in part.ids) for part in chunk)
    return PackRows(numbers, counts, dict(zip(numbers, layout.sizes, strict=True)))


def cut(parts: Sequence[MicroBatch], most: int | None) -> list[list[MicroBatch]]:
    """Cut one micro-batch of a pack into chunks of at most `most` samples; a trial's samples may be cut too."""
    if most is None:
        return [list(parts)]
    chunks: list[list[MicroBatch]] = [[]]
    room = most
    for part in parts:
        start = 0
        while start < len(part.ids):
            if room == 0:
                chunks.append([])
                room = most
            end = min(len(part.ids), start + room)
            last = part.last and end == len(part.ids)
            chunks[-1].append(replace(part, ids=part.ids[start:end], targets=part.targets[start:end], last=last))
            room -= end - start
            start = end
    return chunks
