"""The losses, each as one value a sample, so that a batch's mean does not depend on how it was cut up.

Shape letters: B samples, T positions, D decoder width, N answer tokens of the batch, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.backbones.base import placed

ALIGNED_BYTES = 256 << 20  # of differences in fp32 that are kept for the backward pass
_AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def shifted(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, position, target) of every label, [N] each; the logits at `position` predict `target`.

    Args:
        labels: [B, T], -100 where nothing is learned; on the CPU, for N is not known before.
    """
    rows, columns = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    return rows, columns, labels[rows, columns + 1]


def logits_at(model: Any, hidden: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Return the logits [N, V] at given positions alone, in fp32 or wider; 8 % of a LLaVA step is saved by this.

    Args:
        model: a transformers model with an output embedding.
        hidden: last hidden states [B, T, D].
        rows: [N].
        positions: [N].
    """
    return wide(model.get_output_embeddings()(hidden[rows, positions]))


def wide(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_by_row(values: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Return the mean of `values` [N] over each row's entries, [B]; a row without entries gives 0."""
    total = values.new_zeros(batch).index_add(0, rows, values)
    count = values.new_zeros(batch).index_add(0, rows, torch.ones_like(values))
    return total / count.clamp(min=1)


def cross_entropy(logits: Tensor, targets: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Eq. (4) of HiFICL: -log P(A_t | Q, A_<t), mean over a sample's answer tokens, [B].

    Args:
        logits: [N, V].
        targets: [N].
        rows: the sample of each token, [N].
        batch: B.
    """
    return mean_by_row(F.cross_entropy(logits, targets, reduction="none"), rows, batch)


def tails(
    rows: Sequence[int], ends: Sequence[int], counts: Sequence[int], width: int, device: torch.device | str
) -> Tensor:
    """Return the last m tokens of every sample as places in a flattened batch [B x T], one sample after another, [N].

    Args:
        rows: the row of each of the S samples.
        ends: where the sample ends in its row.
        counts: m of each sample.
        width: T.
        device: of the result.
    """
    samples = zip(rows, ends, counts, strict=True)
    places = [row * width + place for row, end, m in samples for place in range(end - m, end)]
    return placed(torch.tensor(places), device)


def at(places: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what takes the states [N, D] at `places` (see `tails`) out of a layer's [B, T, D]."""
    return lambda hidden: hidden.flatten(0, 1)[places.to(hidden.device)]


def alignment(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """MimIC's L_align: mean over layers of the MSE of hidden states at the query and answer positions, [S].

    Args:
        student: hidden states by layer, L tensors [N, D], of the S samples' queries alone, one after another.
        teacher: S tensors [L, m, D]: the same tokens behind the demonstrations, m of them.
    """
    counts = [target.shape[1] for target in teacher]
    sample = placed(torch.tensor([s for s, m in enumerate(counts) for _ in range(m)]), student[0].device)
    taught, layers = torch.cat(list(teacher), 1), list(student)
    at_once = max(1, ALIGNED_BYTES // (4 * layers[0].numel()))
    if at_once >= len(layers):  # one difference for all: a product a row and layer would be all overhead
        return mean_by_row((wide(torch.stack(layers)) - wide(taught)).square().mean((0, 2)), sample, len(counts))
    # of long rows the differences in fp32 would be half as large as all that the decoder keeps: made again when needed
    parts = [
        checkpoint(_squares, taught[i : i + at_once], *layers[i : i + at_once], **_AGAIN)
        for i in range(0, len(layers), at_once)
    ]
    return mean_by_row(torch.stack(parts).sum(0) / (len(layers) * taught.shape[-1]), sample, len(counts))


def _squares(teacher: Tensor, *student: Tensor) -> Tensor:
    """Return the squared distances [N] of some layers' states, summed over layers and width."""
    return (wide(torch.stack(student)) - wide(teacher)).square().sum((0, 2))


def divergence(student: Tensor, teacher: Tensor, rows: Tensor, batch: int) -> Tensor:
    """LIVE's loss: KL(teacher || student) of the answer tokens' distributions, mean over a sample's tokens, [B].

    Args:
        student: logits [N, V].
        teacher: logits [N, V] of the same tokens behind the demonstrations.
        rows: [N].
        batch: B.
    """
    per_token = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return mean_by_row(per_token, rows, batch)
