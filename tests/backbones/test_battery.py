"""Every class that `hificl backbones` lists as tested, on tiny random weights in the hub's layout, in fp64.

What must hold of each: the decoder's contract; attention equal to the plain oracle; an image written as the processor
writes it; visual tokens kept equal to pixels and to the processor's own call; decoding with a cache equal to one full
pass; padding on either side without effect; several images; an adapter and its backbone saved and loaded; the answer's
span exact; gradients that reach the adapter.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from pipeline import adapters, backbones
from pipeline.adapters.attach import attach, edited_attention
from pipeline.attention.reference import merge_attention_reference
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.families.generic import architectures
from pipeline.config.schema import BackboneSource
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate.generate import generate
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import encode_all, render
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks.vqa import VQA_TEMPLATE
from tests.support import tiny_hub

EXACT = 1e-11  # of logits of about 1 to 100, in fp64
TARGET = "a red kite"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name, size in {"wide": (40, 56, 3), "high": (90, 48, 3), "small": (40, 40, 3)}.items():
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    return folder


class Case:
    """One class: its backbone in fp64, two prompts of different lengths, and a HiFICL adapter that changes much."""

    def __init__(self, model_type, folder, pictures):
        if model_type == "smolvlm":
            pytest.importorskip("num2words")
        self.folder = tiny_hub.make(model_type, folder)
        self.source = BackboneSource(hub=str(self.folder))
        self.loaded = backbones.load_from("mine", self.source, dtype=torch.float64)
        self.model, self.family = self.loaded.model, self.loaded.family
        for config in (self.model.config, self.model.config.get_text_config()):
            config._experts_implementation = "eager"  # the grouped product knows no fp64
        self.spec = decoder_of(self.model)
        # linear attention is computed in fp32 whatever the dtype, in one order with a cache and in another without
        self.near = 1e-6 if self.spec.num_attentions == self.spec.num_layers else 1e-3
        names = (["high"], ["wide", "small"]) if self.family.reads_images else ([], [])
        self.samples = [
            Sample(
                "vqav2",
                i,
                tuple(ImageRef(str(pictures / f"{name}.png")) for name in of_row),
                question,
                TARGET,
                (TARGET,),
            )
            for i, (of_row, question) in enumerate(zip(names, ("What flies?", "And what is this, in the sky?")))
        ]
        self.rendered = [render(VQA_TEMPLATE, self.loaded.backbone, sample) for sample in self.samples]
        self.encoded = encode_all(self.loaded, self.rendered)
        self.visual = VisualTokens(self.loaded, None)
        self.adapter = adapters.create("hificl", self.model, num_virtual_tokens=3, rank=2).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def pictures_of(self, row):
        return [Image.open(image.path).convert("RGB") for image in self.samples[row].images]

    def batch(self, rows, encoded=None, **settings):
        encoded = [(encoded or self.encoded)[row] for row in rows]
        pixels = settings.pop("pixels", False)
        images = [e.images for e in encoded]
        given = (
            {"pixels": self.visual.pixels(images)}
            if pixels and self.family.reads_images
            else {"visual": self.visual.get([image for row in images for image in row])}
        )
        return collate(encoded, self.loaded, **given, **settings)

    def logits(self, batch):
        with torch.no_grad():
            return self.model(**batch.model_inputs(self.loaded), use_cache=False).logits


@pytest.fixture(scope="module", params=sorted(tiny_hub.HUB))
def case(request, tmp_path_factory, pictures):
    return Case(request.param, tmp_path_factory.mktemp("hub") / request.param, pictures)


def close(a, b, tolerance=EXACT):
    """Whether two tensors agree, relative to the largest value; neither may be empty or not finite."""
    assert a.shape == b.shape and a.numel() and torch.isfinite(a).all()
    difference, size = float((a - b).abs().max()), max(1.0, float(b.abs().max()))
    assert difference <= tolerance * size


def test_the_decoder_is_the_configurations(case):
    config = case.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    assert case.spec.num_layers == config.num_hidden_layers
    assert case.spec.num_attentions == sum(kind not in ("linear_attention", "conv") for kind in kinds) > 0
    assert (case.spec.num_heads, case.spec.num_kv_heads, case.spec.head_dim) == (4, 2, 16)
    assert case.spec.hidden_size == 64
    assert case.loaded.backbone.parameters == sum(p.numel() for p in case.model.parameters())


def oracle(keys, values, q, k, v, mask, *, scale, causal):
    """Attend by explicit concatenation, for one layer."""
    if mask is None and not causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return merge_attention_reference(q, k, v, keys, values, mask=mask, scale=scale)


def test_attention_is_the_oracles_and_without_virtual_tokens_the_models_own(case):
    batch = case.batch([0, 1], side="left")
    real = batch.attention_mask.bool()
    base = case.logits(batch)
    tokens = case.adapter()
    for count in (3, 0):
        edits = [
            partial(oracle, tokens["keys"][i, :, :count].detach(), tokens["values"][i, :, :count].detach())
            for i in range(case.spec.num_attentions)
        ]
        with edited_attention(case.spec, edits):
            expected = case.logits(batch)
        if count:
            with attach(case.model, case.adapter):
                attached = case.logits(batch)
            close(attached[real], expected[real])
            assert float((attached - base)[real].abs().max()) > 1e-3
        else:
            close(base[real], expected[real])
    close(case.logits(batch), base, 0)


def test_images_are_written_and_seen_as_by_the_processors_own_call(case):
    if not case.family.reads_images:
        pytest.skip("a text decoder")
    for row, rendered in enumerate(case.rendered):
        text = rendered.text
        start = case.loaded.tokenizer.bos_token
        own = case.loaded.processor(
            text=[text],
            images=[case.pictures_of(row)],
            return_tensors="pt",
            add_special_tokens=not text.startswith(start),
        )
        assert own["input_ids"][0].tolist() == list(case.encoded[row].input_ids)
        arguments = {k: v.double() if v.is_floating_point() else v for k, v in own.items()}
        with torch.no_grad():
            expected = case.model(**arguments, use_cache=False).logits
        close(case.logits(case.batch([row])), expected)
        close(case.logits(case.batch([row], pixels=True)), expected)


def test_kept_visual_tokens_are_the_pixels(case):
    kept, seen = case.batch([0, 1]), case.batch([0, 1], pixels=True)
    for row, length in enumerate(kept.lengths.tolist()):  # behind it a pad sees what it will
        close(case.logits(kept)[row, :length], case.logits(seen)[row, :length])


def test_decoding_with_a_cache_is_one_full_pass(case):
    for pixels in (False, True):
        batch = case.batch([0, 1], side="left", pixels=pixels)
        with attach(case.model, case.adapter), torch.no_grad():
            out = case.model.generate(
                **batch.model_inputs(case.loaded), max_new_tokens=4, min_new_tokens=4, do_sample=False,
                return_dict_in_generate=True, output_logits=True, suppress_tokens=case.loaded.never_generated,
            )  # fmt: skip
            ids = out.sequences
            added = ids.shape[1] - batch.input_ids.shape[1]
            mask = torch.nn.functional.pad(batch.attention_mask, (0, added), value=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            whole = replace(
                batch, input_ids=ids, attention_mask=mask, position_ids=positions,
                pixels=case.batch([0, 1], side="left", pixels=True).pixels if pixels else None,
            )  # fmt: skip
            full = case.logits(whole)[:, -added - 1 : -1]
        close(torch.stack(out.logits, 1).double(), full.double(), case.near)


def test_padding_changes_nothing(case):
    alone = [case.logits(case.batch([row]))[0] for row in (0, 1)]
    right, left = case.logits(case.batch([0, 1])), case.logits(case.batch([0, 1], side="left"))
    for row, logits in enumerate(alone):
        close(right[row, : len(logits)], logits, case.near)
        close(left[row, -len(logits) :], logits, case.near)


def test_saved_and_loaded_it_computes_the_same(case, tmp_path):
    batch = case.batch([0, 1])
    with attach(case.model, case.adapter):
        expected = case.logits(batch)
    case.adapter.save_pretrained(tmp_path)
    again = backbones.load_from("mine", case.source, dtype=torch.float64)
    again.model.config.get_text_config()._experts_implementation = "eager"
    assert again.digest == case.loaded.digest == backbones.digest_of("mine", case.source)
    adapter = adapters.load(tmp_path, again.model).double()
    with attach(again.model, adapter), torch.no_grad():
        logits = again.model(**batch.model_inputs(again), use_cache=False).logits
    real = torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    close(logits[real], expected[real], 1e-5)  # an adapter is kept in fp32


def test_the_answers_span_is_exact_and_learns(case):
    chat = case.loaded.backbone.chat
    closed = [render(VQA_TEMPLATE, case.loaded.backbone, sample, answer=True) for sample in case.samples]
    encoded = encode_all(case.loaded, closed)
    for rendered, e, opened in zip(closed, encoded, case.encoded):
        start, end = e.answer_span
        written = case.loaded.tokenizer.decode(e.input_ids[start:end])
        assert written == rendered.text[slice(*rendered.answer_span)]
        assert written.strip() == TARGET + (chat.terminator if chat else "")
        assert e.input_ids[:start] == opened.input_ids
        assert end == len(e) or chat is None
    batch = case.batch([0, 1], encoded)
    image = case.loaded.image_token_id
    assert image < 0 or not bool((batch.labels == image).any())
    case.adapter.zero_grad()
    with attach(case.model, case.adapter):
        logits = case.model(**batch.model_inputs(case.loaded), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in case.adapter.parameters())


def test_it_answers(case, monkeypatch):
    with attach(case.model, case.adapter):
        monkeypatch.setattr("pipeline.backbones.passes.free_bytes", lambda device: 1 << 40)  # as on a card
        texts = generate(case.loaded, case.encoded, max_new_tokens=3, visual_tokens=case.visual)
        one = [generate(case.loaded, [e], max_new_tokens=3, visual_tokens=case.visual)[0] for e in case.encoded]
    assert texts == one


def test_the_list_says_what_passes():
    passed = {row.model_type for row in architectures().values() if row.status == "tested"}
    assert passed == set(tiny_hub.HUB)
    assert sum(row.reads == "images" for row in architectures().values() if row.status == "tested") >= 25
