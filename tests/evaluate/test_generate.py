"""Generation: independent of how prompts share batches, stopped where it should, and quick enough."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch

from pipeline import adapters, backbones
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate import generate as generation
from pipeline.evaluate.generate import cut_at_stop, generate
from pipeline.prompts.prompt import Encoded, encode_all, render, stop_strings
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


def with_noise(adapter):
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


@pytest.mark.parametrize("method", [None, "hificl", "mimic", "live", "lora"])
def test_an_instruction_that_all_prompts_begin_with_is_computed_once(method, loaded, pictures, monkeypatch):
    """Behind it stand questions of other lengths; with nothing attached it stands beside the rows, not in them."""
    questions = ["What is " + "very " * (i % 3) + f"{word}?" for i, word in enumerate(("red", "it", "a dog", "that"))]
    samples = [Sample("vqav2", i, (ImageRef(f"{i % 2}.png"),), text, "red", ()) for i, text in enumerate(questions)]
    rendered = [render(TEMPLATE, loaded.backbone, sample) for sample in samples]
    requests = encode_all(loaded, rendered, image_sizes=[[(56, 56)]] * len(samples))
    # an image of thousands of tokens behind it leaves the instruction too small a part to share
    monkeypatch.setattr(generation, "LEAST_SAVED", 0)
    options = {"max_new_tokens": 5, "visual_tokens": VisualTokens(loaded), "root": pictures, "stop_strings": ()}
    head = generation.common_head(requests, loaded.image_token_id)
    assert head is not None and not head.images and len(head) >= requests[0].query_start
    adapter = with_noise(adapters.create(method, loaded.model)) if method else None
    with adapters.attach(loaded.model, adapter) if adapter else nullcontext() as pack:
        shared = generate(loaded, requests, **options, batch_size=3)
        assert shared == generate(loaded, requests, **options, batch_size=3, from_pixels=True)
        assert shared == generate(loaded, requests, **options, batch_size=3, pack=pack, members=[0] * 4 if pack else ())
        monkeypatch.setattr(generation, "can_stand_beside", lambda _: False)
        assert shared == generate(loaded, requests, **options, batch_size=3)
        assert shared == [generate(loaded, [request], **options)[0] for request in requests]
    assert len(set(shared)) > 1


def test_the_common_head_of_prompts():
    def request(ids, images="", query_start=0):
        return Encoded(tuple(ids), tuple(images), query_start, None, 0, len(images) - 1)

    image = 9
    two = [request((1, 2, 3, image, 4), "a"), request((1, 2, 3, image, 5, 6), "b")]
    assert generation.common_head(two, image) == Encoded((1, 2, 3), (), 0, None, 0)
    assert generation.common_head(two[:1], image) is None  # nobody to share with
    shown = [request((1, image, 2, 3, image, end), ("a", end), 3) for end in (4, 5)]
    assert generation.common_head(shown, image) == Encoded((1, image, 2, 3), ("a",), 0, None, 0)
    others = [request((1, image, 2, 3, image, end), (end, "a"), 3) for end in (4, 5)]
    assert generation.common_head(others, image) is None  # one token of six
    assert generation.without_head(shown[1], generation.common_head(shown, image)).input_ids == (image, 5)
    same = [request((1, 2)), request((1, 2))]
    assert generation.common_head(same, image) == Encoded((1,), (), 0, None, 0)  # a token of each is left


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
