"""Task vectors, and what they share with function vectors: prompts to read states from, one place to edit, its layer.

Shape letters: L layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.backbones.decoder import decoder_of
from pipeline.baselines import Baseline, BaselineOptions, Setting, baselines
from pipeline.baselines.demonstrations import draw_from
from pipeline.core.errors import InputError
from pipeline.data.sample import Sample
from pipeline.prompts.prompt import draw_demos

Shots = tuple[Sample, list[Sample]]  # a query and its demonstrations
Edit = Callable[[Tensor], Tensor]  # [B, D] -> [B, D]


class VectorOptions(BaselineOptions):
    """Where the vector comes from and where it goes."""

    num_shots: int = Field(8, ge=1)  # demonstrations in a prompt that states are read from
    num_prompts: int = Field(1, ge=1)  # prompts that are averaged over; at most the pool's samples
    layer: int | None = Field(None, ge=0)  # counted from 0; None: the best on the selection split

    def selects(self) -> bool:
        """The layer, unless it is given."""
        return self.layer is None


class VectorMethod(Baseline):
    """A method that edits the hidden state of the last prompt token after one layer of the zero-shot run."""

    options: Any

    def fit(self, setting: Setting) -> None:
        """Read the vectors off the frozen model, then choose the layer with the best score; the first of equals.

        Raises:
            InputError: the layer asked for does not exist, or there is nothing to choose it on.
        """
        super().fit(setting)
        self.spec = decoder_of(setting.host.loaded.model)
        given = self.options.layer
        if given is not None and given >= self.spec.num_layers:
            raise InputError(
                f"layer {given} is asked for, the decoder has {self.spec.num_layers}",
                where="layer",
                way_out=f"Give 0 to {self.spec.num_layers - 1}, or null to choose on the selection set",
            )
        with torch.no_grad():
            self.read()
        self.layer = self._best_layer() if given is None else given
        self.found["layer"] = self.layer

    def read(self) -> None:
        """Compute the vectors from prompts of the pool."""
        raise NotImplementedError

    def edit(self, layer: int) -> Edit:
        """Return what is done with the last prompt token's state after `layer`."""
        raise NotImplementedError

    def edited(self) -> AbstractContextManager[None]:
        """Return a context in which every prompt is run with the edit."""
        return edited_prefill(self.spec.layers[self.layer], self.edit(self.layer))

    def shots(self, number: int, use: str) -> list[Shots]:
        """Return `number` queries of the pool with demonstrations, fixed by the seed.

        Args:
            number: how many; at most as many as the pool has samples.
            use: tells apart draws for different purposes.
        """
        pool, seed = self.setting.pool, self.setting.seed
        by_id = {sample.sample_id: sample for sample in pool}
        ids = draw_demos(list(by_id), "", min(number, len(by_id)), seed, draw=use)
        return [(by_id[i], draw_from(pool, by_id[i], self.options.num_shots, seed, draw=use)) for i in ids]

    def run(self, shots: Sequence[Shots]) -> Tensor:
        """Return the next token's logits [B, V] behind open prompts of one length, in fp32."""
        setting = self.setting
        queries, demos = zip(*shots, strict=True)
        encoded = setting.host.prompts(setting.manifest, queries, demos, answer=False)
        model = setting.host.loaded.model
        inputs = setting.host.batch(encoded, setting.manifest).model_inputs(setting.host.loaded)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden[:, -1]).float()

    def _best_layer(self) -> int:
        setting = self.setting
        if not setting.selection:
            raise InputError(
                "there is no selection sample to choose the layer on",
                where="num_selection_samples",
                way_out="Draw some, or give the layer",
            )
        scores = []
        for layer, module in enumerate(self.spec.layers):
            with edited_prefill(module, self.edit(layer)):
                scores.append(setting.score(setting.selection))
        self.found["selection_scores"] = scores
        return max(range(len(scores)), key=scores.__getitem__)


@contextmanager
def edited_prefill(layer: nn.Module, edit: Edit) -> Iterator[None]:
    """Edit the last position's hidden state after `layer`, in the pass over the prompt alone.

    For prompts that end at the batch's last position: one prompt, or rows padded on the left. A pass over a single
    position is a step of cached decoding; it sees the edit through the cache of the layers above.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        if h.shape[1] == 1:
            return output
        h = torch.cat([h[:, :-1], edit(h[:, -1]).to(h.dtype).unsqueeze(1)], dim=1)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = layer.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def last_states(modules: Sequence[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Collect the last position's output (or first input) [B, D] of each module in fp32, in the order of the calls."""
    seen: list[Tensor] = []

    def keep(value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen.append(value[:, -1].float())

    if inputs:
        handles = [module.register_forward_pre_hook(lambda m, args: keep(args)) for module in modules]
    else:
        handles = [module.register_forward_hook(lambda m, args, output: keep(output)) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class TaskVectorOptions(VectorOptions):
    """One prompt, as in the paper, unless `num_prompts` asks for a mean over several."""


@baselines.register
class TaskVector(VectorMethod):
    """h_l[last] <- theta_l, theta_l = h_l[last] of [k demonstrations ; dummy query] (Hendel et al. 2023).

    The dummy query is a sample of the pool, so that no query sees its own answer. With `num_prompts` above 1 theta_l
    is the mean over as many prompts.
    """

    name = "task-vector"
    Options: ClassVar[type[BaselineOptions]] = TaskVectorOptions

    def read(self) -> None:
        """Take the states after every layer, [L, D]."""
        states = []
        for shots in self.shots(self.options.num_prompts, "task-vector"):
            with last_states(self.spec.layers) as seen:
                self.run([shots])
            states.append(torch.cat(seen))
        self.vectors = torch.stack(states).mean(0)

    def edit(self, layer: int) -> Edit:
        """Put the vector in the state's place."""
        return self.vectors[layer].expand_as
