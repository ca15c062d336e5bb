"""Second phase of pre-training: the decoder learns to read images and to take its words from demonstrations."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.backbones.decoder import decoder_of
from pipeline.core.progress import Report
from pipeline.miniature.documents import ANSWER_WEIGHT, Curriculum, DocumentBatch, DocumentSource, Renderer
from pipeline.miniature.lexicon import (
    ATTRIBUTES,
    NUM_DIALECTS,
    Convention,
    Signed,
    draw_convention,
    draw_signed,
    signs,
    value_words,
)
from pipeline.miniature.model import Miniature, decode_hidden, token_id
from pipeline.miniature.unfinished import Phase, Unfinished
from pipeline.miniature.vision import cosine


@dataclass(frozen=True)
class DecoderPhase:
    """How the decoder phase runs; the vision tower stays as it is, its tokens are computed once.

    Attributes:
        sign_weight: of what `SignHead` loses.
    """

    steps: int = 4500
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    log_every: int = 100
    num_probe_documents: int = 64
    probe_pairs: int = 9
    sign_weight: float = 0.0
    curriculum: Curriculum = field(default_factory=Curriculum)


def document_loss(model: PreTrainedModel, batch: DocumentBatch, visual: Tensor) -> Tensor:
    """Return the weighted mean cross-entropy (nats) over the answers' tokens.

    Logits are computed only where there is a weight, which is a tenth of the positions.
    """
    hidden = decode_hidden(model, batch.input_ids, visual[batch.images])[:, :-1]
    weights = batch.weights[:, 1:]
    chosen = weights > 0
    losses = F.cross_entropy(model.lm_head(hidden[chosen]), batch.input_ids[:, 1:][chosen], reduction="none")
    return (losses * weights[chosen]).sum() / weights[chosen].sum()


class SignHead(nn.Module):
    """Reads behind the second layer whose picture a pair shows, where its answer is asked for and where it begins.

    It is trained beside the decoder and dropped after. To take a word from the demonstrations that bear the question's
    sign, a decoder has to note a pair's sign in two places and to compare them; while one of these is missing the
    others gain nothing, and without this head the loss stays where it is (docs/decisions/0016).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        layers = decoder_of(model).layers
        width = model.config.get_text_config().hidden_size
        self.asked, self.begun = nn.Linear(width, 1), nn.Linear(width, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)  # draws nothing, so that what follows is the same in one piece and in two
        self._states = torch.empty(0)
        layers[1].register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: object, states: Tensor | tuple[Tensor, ...]) -> None:
        self._states = states[0] if isinstance(states, tuple) else states

    def loss(self, batch: DocumentBatch, signs_of: Tensor) -> Tensor:
        """Return the cross-entropy (nats), summed over both places, of a batch with an image a pair.

        Args:
            batch: what the decoder has just read.
            signs_of: [N] of the pool's images.
        """
        answers = batch.weights == ANSWER_WEIGHT
        begins = answers & ~F.pad(answers[:, :-1], (1, 0))
        asks = F.pad(begins[:, 1:], (0, 1))
        truth = signs_of[batch.images].float()
        losses = [
            F.binary_cross_entropy_with_logits(part(self._states[places]).squeeze(-1), truth)
            for part, places in ((self.asked, asks), (self.begun, begins))
        ]
        return losses[0] + losses[1]


def train_decoder(
    spec: Miniature,
    model: PreTrainedModel,
    attributes: np.ndarray,
    visual: Tensor,
    phase: DecoderPhase,
    rng: np.random.Generator,
    progress: Report,
    unfinished: Unfinished,
) -> None:
    """Train everything but vision tower and connector in place; `unfinished` has the curve.

    Args:
        spec: which miniature.
        model: what is trained.
        attributes: [N, 8] of the pool's images.
        visual: [N, visual_tokens, d], their visual tokens.
        phase: how.
        rng: of the documents.
        progress: gets a line a record.
        unfinished: what it goes on from, and keeps at each record: `step`, `loss` by kind of document since the last
            one, and the emergence of in-context learning (`emergence`).
    """
    parameters = [p for name, p in model.named_parameters() if not spec.is_visual(name)]
    modules: list[nn.Module] = [model]
    if phase.sign_weight:
        modules.append(head := SignHead(model).to(model.device))
        parameters += head.parameters()
        signs_of = torch.from_numpy(signs(attributes)).to(model.device)
        signed_probe = draw_probe(spec, attributes, np.random.default_rng(12), phase.num_probe_documents, signed=True)
    optimiser = torch.optim.AdamW(
        parameters, lr=phase.learning_rate, weight_decay=phase.weight_decay, betas=(0.9, 0.98)
    )
    source = DocumentSource(spec, attributes, phase.curriculum, rng)
    probe = draw_probe(spec, attributes, np.random.default_rng(11), phase.num_probe_documents, phase.probe_pairs)
    here = Phase("decoder", modules, optimiser, rng)
    unfinished.restore(here)
    losses: dict[str, list[float]] = {}
    model.train()
    for step in range(here.step, phase.steps):
        for group in optimiser.param_groups:
            group["lr"] = phase.learning_rate * cosine(step, phase.steps, phase.warmup_steps, floor=0.05)
        batch = source.draw(step / phase.steps).to(model.device)
        loss = answers_loss = document_loss(model, batch, visual)
        if phase.sign_weight and batch.kind != "warm-up":
            loss = loss + phase.sign_weight * head.loss(batch, signs_of)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        here.step = step + 1
        losses.setdefault(batch.kind, []).append(answers_loss.item())
        if (step + 1) % phase.log_every == 0 or step + 1 == phase.steps:
            means = {kind: float(np.mean(values)) for kind, values in sorted(losses.items())}
            record: dict[str, object] = {
                "step": step + 1,
                "loss": means,
                **emergence(model, probe, visual),
            }
            if phase.sign_weight:
                record |= looking(model, signed_probe, visual)
            unfinished.keep(here, record)
            losses.clear()
            progress(
                step + 1,
                phase.steps,
                "decoder: loss "
                + ", ".join(f"{kind} {value:.3f}" for kind, value in means.items())
                + f"; right value {record['right_value']:.2f}, right word unseen {record['unseen']:.2f}"
                f" -> seen {record['seen']:.2f}",
            )


@dataclass(frozen=True)
class Probe:
    """Documents on which emergence is measured.

    Attributes:
        batch: VQA documents.
        shown: [B, pairs], whether the topic, or its value, was asked for before in the document.
        first_word: id of the first value's word.
    """

    batch: DocumentBatch
    shown: np.ndarray
    first_word: int


def draw_probe(
    spec: Miniature, attributes: np.ndarray, rng: np.random.Generator, num_documents: int, num_pairs: int = 9,
    redraw: float = 0.0, signed: bool = False,
) -> Probe:  # fmt: skip
    """Draw VQA documents over a pool of images with `attributes` [N, 8].

    Where values leave their topic's dialect (`redraw`), what counts as shown is the value, not the topic. Documents by
    two groups (`signed`) ask for one topic each, and what counts is whether both have spoken.
    """
    source = DocumentSource(spec, attributes, Curriculum(), rng)
    renderer: Renderer = source.renderer
    documents, shown = [], []
    for _ in range(num_documents):
        convention: Convention | Signed = draw_convention(rng, redraw=redraw)
        images = rng.integers(len(attributes), size=num_pairs)
        topics = rng.integers(len(ATTRIBUTES), size=num_pairs)
        if signed:
            convention, topics = draw_signed(rng, redraw=0.0), np.full(num_pairs, topics[0])
        pieces = []
        for image, topic in zip(images, topics, strict=True):
            pieces += renderer.vqa(attributes[image], int(topic), convention)
        documents.append((pieces, images.tolist()))
        words = [
            (topic, attributes[image][topic] if redraw else 0) for image, topic in zip(images, topics, strict=True)
        ]
        whose = signs(attributes[images])
        both_spoke = [len(set(whose[:nth])) > 1 for nth in range(num_pairs)]
        shown.append(both_spoke if signed else [word in words[:nth] for nth, word in enumerate(words)])
    first_word = token_id(spec.make_tokenizer(), value_words()[0])
    return Probe(source.collate("vqa", documents), np.array(shown), first_word)


@torch.no_grad()
def emergence(model: PreTrainedModel, probe: Probe, visual: Tensor) -> dict[str, float]:
    """Measure in-context learning.

    Returns:
        fractions: `seen` and `unseen`, right words on topics that were or were not asked before in the
        document; `right_value`, answers that name the right value in any dialect.
    """
    guess, truth = _answered(model, probe, visual, probe.batch.images)
    # The ids of a value's words are consecutive, in the order of the dialects.
    same_value = (guess - probe.first_word) // NUM_DIALECTS == (truth - probe.first_word) // NUM_DIALECTS
    right, shown = (guess == truth).numpy(), probe.shown
    return {
        "seen": float(right[shown].mean()),
        "unseen": float(right[~shown].mean()),
        "right_value": float(same_value.float().mean()),
    }


@torch.no_grad()
def looking(model: PreTrainedModel, probe: Probe, visual: Tensor) -> dict[str, float]:
    """Measure whether demonstrations are looked at, on documents by two groups (`draw_probe` with `signed`).

    Returns:
        fractions of right words for the last image of a document before which both groups have spoken: `signed`, and
        `signed_shuffled` where each image before it is the next one's.
    """
    images = probe.batch.images.view(probe.shown.shape)
    shuffled = torch.cat([images[:, :-1].roll(1, dims=1), images[:, -1:]], dim=1)
    shares = {}
    for name, seen in (("signed", images), ("signed_shuffled", shuffled)):
        guess, truth = _answered(model, probe, visual, seen.flatten())
        shares[name] = float((guess == truth)[:, -1].numpy()[probe.shown[:, -1]].mean())
    return shares


@torch.no_grad()
def _answered(model: PreTrainedModel, probe: Probe, visual: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids that a model guesses for the answers of a probe with these images, and the true ones."""
    model.eval()
    batch, ids = probe.batch, probe.batch.input_ids.to(model.device)
    logits = model.lm_head(decode_hidden(model, ids, visual[images.to(model.device)]))[:, :-1].cpu()
    answers = batch.weights[:, 1:] == ANSWER_WEIGHT
    truth = batch.input_ids[:, 1:][answers].view(probe.shown.shape)
    guess = logits.argmax(-1)[answers].view(probe.shown.shape)
    model.train()
    return guess, truth
