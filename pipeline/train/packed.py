"""The losses of one micro-batch that several trials share: one forward pass, every row with its own trial's adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.adapters.pack import Pack, PackRows
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.states import recorded
from pipeline.data.collate import Batch
from pipeline.train import loss
from pipeline.train.folded import Fold, folded
from pipeline.train.resident import Resident
from pipeline.train.run import Part, TrialRun
from pipeline.trial import State

Losses = dict[str, Tensor]  # "train_loss" and its parts, scalars
Work = Sequence[tuple[int, TrialRun, Part]]  # each with its number in the pack


def losses(resident: Resident, pack: Pack, work: Work) -> list[Losses]:
    """Return each trial's share of its global batch's mean loss, and the parts of it.

    Args:
        resident: the backbone; `pack` is attached to it.
        pack: adapters; its rows are set here.
        work: for every trial that takes part its number in the pack, itself, and its samples.
    """
    roots = {run.manifest.image_root for _, run, _ in work}
    batch = resident.batch(
        [run.prompts[i] for _, run, part in work for i in part.ids],
        work[0][1].manifest if len(roots) == 1 else [run.manifest for _, run, part in work for _ in part.ids],
        span=[run.config.loss_span for _, run, part in work for _ in part.ids],
        pixels=work[0][1].facts.trains_vision,
    )
    model, spec = resident.loaded.model, decoder_of(resident.loaded.model)
    fold = _fold(resident, batch, work)
    if fold is None:
        widths = {number: max(len(run.prompts[i]) for i in part.ids) for number, run, part in work}
        numbers = tuple(number for number, _, part in work for _ in part.ids)
        pack.use(PackRows(numbers, batch.image_counts, widths))
    else:
        images = iter(batch.image_counts)
        counts = tuple(sum(next(images) for _ in part.ids) for *_, part in work)
        pack.use(PackRows(tuple(number for number, *_ in work), counts))
    compared = _compared(work, batch)
    with ExitStack() as stack:
        states = {
            state: stack.enter_context(recorded(spec, state, loss.at(fold.where(mine.places) if fold else mine.places)))
            for state, mine in compared.items()
        }
        stack.enter_context(folded(spec, fold))
        hidden = model.model(**batch.model_inputs(resident.loaded), use_cache=False).last_hidden_state
    rows, positions, targets = loss.shifted(batch.labels)
    logits = loss.logits_at(model, hidden, rows, positions)
    truth = loss.cross_entropy(logits, targets, rows, len(batch))
    imitated = _imitation(work, compared, states, logits, rows)
    ends = list(accumulate(len(part.ids) for _, _, part in work))
    found = []
    for (number, run, part), end in zip(work, ends, strict=True):
        mine = truth[end - len(part.ids) : end].sum() * part.weight
        total, parts = run.config.ground_truth_weight * mine, {"ground_truth_loss": mine.detach()}
        if run.facts.teacher is not None:
            imitation = imitated[number] * part.weight
            total = total + run.config.alignment_weight * imitation
            parts["alignment_loss"] = imitation.detach()
        found.append({"train_loss": total, **parts})
    return found


def _fold(resident: Resident, batch: Batch, work: Work) -> Fold | None:
    """Return how the decoder's rows are folded, or None where they are not."""
    if not resident.loaded.family.shares_prefix or any(run.facts.drops for _, run, _ in work):
        return None
    lengths = iter(batch.lengths.tolist())
    return Fold.of(
        [[next(lengths) for _ in part.ids] for *_, part in work],
        [run.head if len(part.ids) > 1 else 0 for _, run, part in work],
        batch.input_ids.shape[1],
        like=resident.loaded.model.get_input_embeddings().weight,
    )


@dataclass(frozen=True)
class _Compared:
    """What of a batch is compared with the teacher in one state, for all trials at once.

    Attributes:
        places: of the tokens, sample by sample, in the flattened batch.
        targets: of the samples.
        owners: each sample's trial, by its number in the pack.
    """

    places: Tensor
    targets: list[Tensor]
    owners: list[int]


def _compared(work: Work, batch: Batch) -> dict[State, _Compared]:
    lengths, ids, row = batch.lengths.tolist(), batch.input_ids, 0
    found: dict[State, list[tuple[int, int, Tensor]]] = {}
    for number, run, part in work:
        for target in part.targets:
            if target.hidden is not None:
                found.setdefault(run.facts.state, []).append((number, row, target.hidden))
            row += 1
        row += len(part.ids) - len(part.targets)
    placed = {}
    for state, samples in found.items():
        rows = [row for _, row, _ in samples]
        counts = [target.shape[1] for *_, target in samples]
        places = loss.tails(rows, [lengths[row] for row in rows], counts, ids.shape[1], ids.device)
        placed[state] = _Compared(places, [target for *_, target in samples], [number for number, *_ in samples])
    return placed


def _imitation(
    work: Work, compared: dict[State, _Compared], states: dict[State, list[Tensor]], logits: Tensor, rows: Tensor
) -> dict[int, Tensor]:
    """Return the summed distance to the teacher of every trial that has one, by its number in the pack."""
    found: dict[int, Tensor] = {}
    start = 0
    for number, run, part in work:
        end = start + len(part.ids)
        if run.facts.teacher == "logits":
            of_mine = (rows >= start) & (rows < end)
            taught = torch.cat([t.logits for t in part.targets if t.logits is not None])
            found[number] = loss.divergence(logits[of_mine], taught, rows[of_mine] - start, end - start).sum()
        start = end
    for state, mine in compared.items():
        apart = loss.alignment(states[state], mine.targets)
        owners = torch.tensor(mine.owners, device=apart.device)
        for number in set(mine.owners):
            found[number] = apart[owners == number].sum()
    return found
