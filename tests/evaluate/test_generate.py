"""Generation: independent of how prompts share batches, stopped where it should, and quick enough."""

from __future__ import annotations

import time

import pytest
import torch

from pipeline import backbones
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate.generate import cut_at_stop, generate
from pipeline.prompts.prompt import encode_all, render, stop_strings
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks.vqa import VQA_TEMPLATE as TEMPLATE


@pytest.fixture(params=backbones.names())
def loaded(request, tiny):
    return tiny(request.param)


def requests_for(loaded, number=5):
    samples = [
        Sample("vqav2", i, (ImageRef(f"{i % 2}.png"),), "What color is the " + "big " * i + "dog?", "red", ())
        for i in range(number)
    ]
    rendered = [
        render(TEMPLATE, loaded.backbone, s, [d for d in samples if d is not s][: i % 3]) for i, s in enumerate(samples)
    ]
    return encode_all(loaded, rendered, image_sizes=[[(56, 56)] * len(r.images) for r in rendered])


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_give_what_single_prompts_give(beams, loaded, pictures):
    visual = VisualTokens(loaded)
    options = {"max_new_tokens": 6, "visual_tokens": visual, "root": pictures, "num_beams": beams, "stop_strings": ()}
    requests = requests_for(loaded)
    together = generate(loaded, requests, **options)
    assert len(set(together)) > 1
    assert together == [generate(loaded, [one], **options)[0] for one in requests]
    assert together == generate(loaded, requests, **options, batch_size=2)
    assert together == generate(loaded, requests[::-1], **options)[::-1]
    assert together == generate(loaded, requests, **options, from_pixels=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_shared_demonstrations_are_computed_once(beams, loaded, pictures, monkeypatch):
    """The answers behind one common head are those of the whole prompts."""
    from pipeline.evaluate.generate import Prefix

    samples = [
        Sample("vqav2", i, (ImageRef(f"{i % 2}.png"),), "What color is the " + "big " * i + "dog?", "red", ())
        for i in range(6)
    ]
    rendered = [render(TEMPLATE, loaded.backbone, query, samples[:2]) for query in samples[2:]]
    requests = encode_all(loaded, rendered, image_sizes=[[(56, 56)] * len(r.images) for r in rendered])
    options = {
        "max_new_tokens": 6, "visual_tokens": VisualTokens(loaded), "root": pictures, "num_beams": beams,
        "stop_strings": (), "batch_size": 3,
    }  # fmt: skip
    heads = []
    original = Prefix.of
    monkeypatch.setattr(Prefix, "of", lambda head, *rest: heads.append(head) or original(head, *rest))
    shared = generate(loaded, requests, **options)
    once = [2] if loaded.family.shares_prefix and beams == 1 else []
    assert [len(head.images) for head in heads] == once
    assert shared == [generate(loaded, [one], **options)[0] for one in requests]
    assert len(heads) == len(once)  # a prompt alone shares nothing


def test_greedy_is_the_arg_max_of_full_forwards(loaded, pictures):
    """An own decoding loop without a cache, one prompt, no padding: the plainest reference."""
    from pipeline.prompts.collate import collate
    from pipeline.prompts.prompt import Encoded

    visual = VisualTokens(loaded)
    request = requests_for(loaded)[2]
    ids, images = list(request.input_ids), visual.get(request.images, pictures)
    with torch.no_grad():
        for _ in range(4):
            step = Encoded(tuple(ids), request.images, 0, None, 0)
            logits = loaded.model(**collate([step], loaded, visual=images).model_inputs(loaded)).logits[0, -1]
            logits[loaded.never_generated] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] in loaded.eos_token_ids:
                break
    wanted = loaded.tokenizer.decode(ids[len(request) :], skip_special_tokens=True).strip()
    got = generate(loaded, [request], max_new_tokens=4, visual_tokens=visual, root=pictures, stop_strings=())
    assert got == [wanted]


@pytest.fixture
def told(tiny):
    """A tiny model whose next token is told: after `from`, `to` follows."""
    loaded = backbones.load("idefics2-8b-base", variant="tiny")

    def tell(text):
        ids = loaded.tokenizer(text, add_special_tokens=False).input_ids
        colon = loaded.tokenizer(":", add_special_tokens=False).input_ids[-1]
        ids = [colon, *ids]
        assert len(set(ids)) == len(ids)
        model = loaded.model
        with torch.no_grad():  # layers that add nothing leave embedding -> norm -> head
            for layer in model.model.text_model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.lm_head.weight.zero_()
            for here, after in zip(ids, ids[1:]):
                model.lm_head.weight[after] = model.get_input_embeddings().weight[here]
        return loaded

    return tell


@pytest.mark.parametrize(
    ("written", "text", "most"),
    [
        ("red\n2 Image", "red", 2),
        ("red Question what", "red", 2),
        ("red</s>dog is", "red", 2),
        ("2<image>7", "2", 20),  # image tokens are never written; what follows is arbitrary
    ],
)
def test_generation_stops_where_the_answer_ends(written, text, most, told, pictures):
    loaded = told(written)
    lengths = []
    original = loaded.model.generate

    def spy(**options):
        out = original(**options)
        lengths.append(out.shape[1] - options["input_ids"].shape[1])
        assert not torch.isin(out[:, options["input_ids"].shape[1] :], torch.tensor(loaded.never_generated)).any()
        return out

    loaded.model.generate = spy
    got = generate(
        loaded,
        requests_for(loaded, 2),
        max_new_tokens=20,
        visual_tokens=VisualTokens(loaded),
        root=pictures,
        stop_strings=stop_strings(TEMPLATE, loaded.backbone),
    )
    assert all(answer.startswith(text) for answer in got)
    if most < 20:
        assert got == [text] * 2
        assert max(lengths) <= most


def test_cut():
    assert cut_at_stop(" red\nImage: ", ("\n", "Image")) == "red"
    assert cut_at_stop("a cat Question", ("\n", "Question")) == "a cat"
    assert cut_at_stop(" plain ", ()) == "plain"
    assert cut_at_stop("\nred", ("\n",)) == ""


def test_nothing_to_generate(tiny):
    loaded = tiny("idefics2-8b-base")
    assert generate(loaded, [], max_new_tokens=3, visual_tokens=VisualTokens(loaded)) == []


@pytest.mark.slow
def test_the_miniature_answers_quickly(tiny, pictures):
    """2,000 zero-shot samples of the miniature's size in seconds; the bound is wide, for shared machines."""
    loaded = tiny("mini-idefics2")
    requests = requests_for(loaded, 50) * 8
    started = time.monotonic()
    generate(loaded, requests, max_new_tokens=4, visual_tokens=VisualTokens(loaded), root=pictures, batch_size=128)
    assert time.monotonic() - started < 60
