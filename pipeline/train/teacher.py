"""The frozen backbone on demonstrations: before a query, as a teacher; alone, as what a method starts from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.options import Facts
from pipeline.backbones.base import placed
from pipeline.backbones.decoder import decoder_of, told
from pipeline.backbones.states import modules_at, recorded
from pipeline.config.trial import Kind, State, TrialConfig
from pipeline.core.errors import InputError, WorkError
from pipeline.data.manifest import Manifest
from pipeline.data.sample import Sample
from pipeline.prompts.collate import Batch
from pipeline.prompts.prompt import Encoded, draw_demos
from pipeline.resident.resident import Resident, Target
from pipeline.tasks import SampleId
from pipeline.train import loss


class Teacher:
    """Computes targets for samples of one trial.

    Args:
        resident: the backbone; no adapter may be attached when `targets` is called.
        manifest: of the task.
        pool: training samples that demonstrations are drawn from.
        config: the trial's; how many are drawn, by which seed, with replacement or without (`draw_demos`).
        facts: whether hidden states or logits are compared, and where.

    Raises:
        InputError: the decoder's layers do not have the states that are compared.
    """

    def __init__(
        self, resident: Resident, manifest: Manifest, pool: Sequence[Sample], config: TrialConfig, facts: Facts
    ) -> None:
        self.resident, self.manifest, self.config, self.facts = resident, manifest, config, facts
        self.pool = {sample.sample_id: sample for sample in pool}
        self.ids: dict[str, list[SampleId]] = {}  # by task: of a mixture, a sample is shown those of its own
        for sample in pool:
            self.ids.setdefault(sample.task, []).append(sample.sample_id)
        self.spec = decoder_of(resident.loaded.model)
        if facts.teacher == "hidden":
            modules_at(self.spec, facts.state)

    def demonstrations(self, sample: Sample, epoch: int) -> list[Sample]:
        """Return the demonstrations of one sample in one epoch, drawn anew each time."""
        config, with_replacement = self.config, self.config.demonstration_draw == "with-replacement"
        drawn = draw_demos(
            self.ids[sample.task], sample.sample_id, config.num_shots, config.seed, draw=epoch,
            replacement=with_replacement,
        )  # fmt: skip
        return [self.pool[i] for i in drawn]

    def targets(self, samples: Sequence[Sample], encoded: Sequence[Encoded], epoch: int) -> list[Target]:
        """Return the targets of a micro-batch whose own prompts are `encoded`.

        Trials with the same demonstrations and batches share them: whoever comes first computes, for all kinds of
        target that will be asked for (`Resident.kinds`).
        """
        kept, kind = self.resident.targets, self.facts.kind
        if kind is None:
            return []
        key = (*self.config.draws, epoch, *(sample.sample_id for sample in samples))
        targets = kept.get((key, kind))
        missing = any(self.resident.loaded.passes.of_ranks(targets is None))
        if targets is None or missing:
            computed = self._compute(samples, encoded, epoch, {kind, *self.resident.kinds})
            for each, of_kind in computed.items():
                kept.put((key, each), of_kind)
            targets = computed[kind]
        return targets

    @torch.no_grad()
    def _compute(
        self, samples: Sequence[Sample], encoded: Sequence[Encoded], epoch: int, kinds: set[Kind]
    ) -> dict[Kind, list[Target]]:
        """Return the samples' targets of each kind, from one pass, or several where the memory does not hold it."""
        shots = [self.demonstrations(sample, epoch) for sample in samples]
        prompts = self.resident.prompts(self.manifest, samples, shots, answer=True)
        each = self.resident.loaded.passes.run(
            "a teacher's pass", list(zip(encoded, prompts, strict=True)), lambda rows: self._pass(rows, kinds),
            width=lambda row: len(row[1]),
        )  # fmt: skip
        return {kind: [targets[kind] for targets in each] for kind in kinds}

    def _pass(self, rows: Sequence[tuple[Encoded, Encoded]], kinds: set[Kind]) -> list[dict[Kind, Target]]:
        """Return each row's targets; a row is a sample's prompt alone, and behind its demonstrations."""
        encoded, prompts = zip(*rows, strict=True)
        batch = self.resident.batch(prompts, self.manifest)
        model, image = self.resident.loaded.model, self.resident.loaded.image_token_id
        counts = [query_length(alone, behind, image) for alone, behind in zip(encoded, prompts, strict=True)]
        # of long rows only the ends are compared, and kept
        ids = batch.input_ids
        ends = loss.at(loss.tails(range(len(prompts)), list(map(len, prompts)), counts, ids.shape[1], ids.device))
        wanted = {kind[1] for kind in kinds if kind[0] == "hidden"}
        with told(ids.device, padded=False), ExitStack() as stack:
            states = {state: stack.enter_context(recorded(self.spec, state, ends)) for state in sorted(wanted)}
            last = model.model(**batch.model_inputs(self.resident.loaded), use_cache=False).last_hidden_state
        targets: list[dict[Kind, Target]] = [{} for _ in prompts]
        for kind in kinds:
            hidden = torch.stack(states[kind[1]]).split(counts, 1) if kind[0] == "hidden" else None
            for row, of_row in enumerate(targets):
                of_row[kind] = Target(hidden[row], None) if hidden else Target(None, self._logits(batch, last, row))
        return targets

    def _logits(self, batch: Batch, hidden: Tensor, row: int) -> Tensor:
        rows, positions, _ = loss.shifted(batch.labels)
        of_row = (placed(x[rows == row], hidden.device) for x in (rows, positions))
        return loss.logits_at(self.resident.loaded.model, hidden, *of_row)


class Demonstrations:
    """What the frozen backbone makes of a trial's demonstrations, for an adapter that starts from them (`base.Shown`).

    They are `num_shots` of its own training samples, the same on every rank, after a resume and in a pack.

    Args:
        resident: the backbone; no adapter may be attached.
        manifest: of the task.
        pool: training samples to draw from.
        config: the trial's: how many, by which seed.
    """

    def __init__(self, resident: Resident, manifest: Manifest, pool: Sequence[Sample], config: TrialConfig) -> None:
        self.resident, self.manifest = resident, manifest
        self.spec = decoder_of(resident.loaded.model)
        by_id = {sample.sample_id: sample for sample in pool if sample.task == pool[0].task}  # one prompt holds them
        self.samples = [by_id[i] for i in draw_demos(list(by_id), "", config.num_shots, config.seed, draw="start")]

    def states(self, state: State) -> Tensor:
        """Return a state of every layer at each demonstration's last token, where it stands alone, [L, k, D]."""

        def ends(prompt: Encoded) -> Tensor:
            with recorded(self.spec, state, lambda x: loss.wide(x[0, -1])) as seen:
                self._run(prompt)
            return torch.stack(seen)

        prompts = self.resident.alone(self.manifest, self.samples, answer=True)
        passes = self.resident.loaded.passes
        return torch.stack(passes.run("demonstrations", prompts, lambda rows: list(map(ends, rows))), 1)

    def cache(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [L, H_kv, n, d] of all of them in one prompt, which ends right before position 0.

        Raises:
            InputError: the backbone's positions are not plain numbers, or its tokens look at pictures by a mask.
        """
        from transformers import DynamicCache

        loaded = self.resident.loaded
        if not loaded.family.shares_prefix:
            problem = "what it makes of demonstrations cannot be put before other prompts"
            raise InputError(problem, where=f"backbone {loaded.backbone.name}", way_out="Use the method prefix")

        def kept(prompt: Encoded) -> tuple[Tensor, Tensor]:
            cache, positions = DynamicCache(), torch.arange(-len(prompt), 0, device=loaded.device)[None]
            self._run(prompt, position_ids=positions, past_key_values=cache, use_cache=True)
            layers: Any = [cache.layers[attention.layer_idx] for attention in self.spec.attentions]
            keys, values = ([loss.wide(getattr(layer, of)[0]) for layer in layers] for of in ("keys", "values"))
            return torch.stack(keys), torch.stack(values)

        *before, last = self.samples
        prompts = self.resident.prompts(self.manifest, [last], [before], answer=True)
        return loaded.passes.run("demonstrations", prompts, lambda rows: list(map(kept, rows)))[0]

    @torch.no_grad()
    def _run(self, prompt: Encoded, **given: Any) -> None:
        loaded, batch = self.resident.loaded, self.resident.batch([prompt], self.manifest)
        with told(batch.input_ids.device, padded=False):
            loaded.model.model(**{**batch.model_inputs(loaded), "use_cache": False, **given})


def query_length(alone: Encoded, behind: Encoded, image_token_id: int) -> int:
    """Return how many tokens of query and answer the two prompts share, counted from their ends.

    The turn's very first tokens may differ: a text's first word has no space before it, and a chat model's instruction
    stands inside the first turn. From the query's image on they must not, without one
    from the answer on.

    Raises:
        WorkError: the tokenizer reads the query differently behind demonstrations.
    """
    limit = min(len(alone) - alone.query_start, len(behind) - behind.query_start)
    pairs = zip(reversed(alone.input_ids), reversed(behind.input_ids), strict=False)
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), limit)
    if behind.images:
        first = behind.input_ids.index(image_token_id, behind.query_start)
    else:
        first = behind.answer_span[0] if behind.answer_span else len(behind)
    if differs < len(behind) - first:
        raise WorkError(f"sample {alone.sample_id} is tokenised differently behind demonstrations")
    return min(differs, limit)
