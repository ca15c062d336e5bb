"""Batches: padding that changes no logit, labels on the answer only, images counted by row."""

from __future__ import annotations

import pytest
import torch

from pipeline import backbones
from pipeline.data.sample import ImageRef, Sample
from pipeline.prompts.collate import IGNORED, collate
from pipeline.prompts.prompt import Encoded, encode_all, render
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks.vqa import VQA_TEMPLATE as TEMPLATE


@pytest.fixture(params=backbones.names())
def loaded(request, tiny):
    return tiny(request.param)


def prompts(loaded, *, answer=True, sizes=((56, 56),) * 3):
    samples = [
        Sample("vqav2", f"q{i}", (ImageRef(f"{i % 2}.png"),), "What is " * (i + 1) + "it?", "a dog " * i + "cat", ())
        for i in range(3)
    ]
    rendered = [render(TEMPLATE, loaded.backbone, query, samples[:i], answer=answer) for i, query in enumerate(samples)]
    return encode_all(loaded, rendered, image_sizes=[sizes[: len(r.images)] for r in rendered])


def test_labels_are_the_answers_tokens(loaded):
    encoded = prompts(loaded)
    batch = collate(encoded, loaded)
    assert batch.attention_mask is None and len(batch) == 3
    for row, e in enumerate(encoded):
        start, end = e.answer_span
        wanted = [IGNORED] * start + list(e.input_ids[start:end])
        assert batch.labels[row, :end].tolist() == wanted
        assert (batch.labels[row, end:] == IGNORED).all()
        assert batch.input_ids[row, : len(e)].tolist() == list(e.input_ids)
        assert (batch.input_ids[row, len(e) :] == loaded.tokenizer.pad_token_id).all()
        assert batch.position_ids[row, : len(e)].tolist() == list(range(len(e)))
    assert batch.lengths.tolist() == [len(e) for e in encoded]
    assert batch.sample_ids == ("q0", "q1", "q2")
    assert batch.image_counts == (1, 2, 3)


def test_the_whole_turn_can_be_trained_but_never_an_image(loaded):
    encoded = prompts(loaded)
    batch = collate(encoded, loaded, span="sequence")
    special = set(loaded.never_generated)
    for row, e in enumerate(encoded):
        wanted = [
            token if i >= e.query_start and token not in special else IGNORED for i, token in enumerate(e.input_ids)
        ]
        assert batch.labels[row, : len(e)].tolist() == wanted


def test_open_queries_have_no_labels(loaded):
    assert (collate(prompts(loaded, answer=False), loaded).labels == IGNORED).all()


def test_left_padding_keeps_every_row(loaded):
    encoded = prompts(loaded)
    left, right = collate(encoded, loaded, side="left"), collate(encoded, loaded)
    for row, e in enumerate(encoded):
        n = len(e)
        assert torch.equal(left.input_ids[row, -n:], right.input_ids[row, :n])
        assert torch.equal(left.labels[row, -n:], right.labels[row, :n])
        assert left.position_ids[row, -n:].tolist() == list(range(n))
        assert left.attention_mask[row].tolist() == [0] * (left.input_ids.shape[1] - n) + [1] * n


@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(loaded, pictures):
    visual = VisualTokens(loaded)
    encoded = prompts(loaded)

    def logits(batch):
        return loaded.model(**batch.model_inputs(loaded)).logits

    def features(rows):
        return visual.get([image for e in rows for image in e.images], pictures)

    right = logits(collate(encoded, loaded, visual=features(encoded)))
    left = logits(collate(encoded, loaded, side="left", visual=features(encoded)))
    for row, e in enumerate(encoded):
        alone = logits(collate([e], loaded, visual=features([e])))[0]
        torch.testing.assert_close(right[row, : len(e)], alone, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(left[row, -len(e) :], alone, atol=2e-5, rtol=1e-4)


def test_moved_batches_keep_everything(loaded):
    e = Encoded((1, 2, 3), (ImageRef("0.png"),), 0, (1, 3), 7)
    batch = collate([e], loaded, side="left", visual=[torch.ones(2, 3)])
    moved = batch.to("meta")
    assert moved.input_ids.is_meta and moved.attention_mask.is_meta and moved.visual[0].is_meta
    assert moved.sample_ids == batch.sample_ids and moved.image_counts == batch.image_counts == (1,)
