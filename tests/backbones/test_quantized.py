"""A frozen backbone whose decoder is stored in 8 or 4 bits: what it computes, what it takes, what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pipeline import backbones
from pipeline.backbones import weights
from pipeline.backbones.decoder import compiled_parts, decoder_of
from pipeline.backbones.weights import dequantized, quantizable, quantize, weight_bytes
from pipeline.core.errors import InputError
from pipeline.train.counting import MemoryOf
from tests.support import tiny_hub

KINDS = ("int8", "nf4")


def passed(model, x):
    """Return hidden states, and the gradient of a loss with respect to what went in."""
    x = x.detach().to(next(p.dtype for p in model.parameters() if p.is_floating_point())).requires_grad_(True)
    with torch.no_grad():  # a pass that answers, before one that trains
        alone = decoder_of(model).decoder(inputs_embeds=x, use_cache=False).last_hidden_state
    hidden = decoder_of(model).decoder(inputs_embeds=x, use_cache=False).last_hidden_state
    assert torch.equal(hidden, alone)
    hidden.float().square().sum().backward()
    return hidden.detach(), x.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["idefics2-8b-base", "llava-interleave-7b", "qwen3-vl-8b"])
def test_it_computes_with_the_numbers_that_its_weights_stand_for(name, kind):
    for dtype in ("fp32", "bf16"):
        plain, ours = (
            backbones.load(name, variant="tiny", dtype=dtype, quantized=given).model for given in ("none", kind)
        )
        stored = quantizable(plain)
        assert stored and not quantizable(ours)
        for part, linear in stored.items():
            near = dequantized(ours.get_submodule(part)).to(linear.weight.dtype)
            assert 0 < (near - linear.weight).norm() / linear.weight.norm() < (0.02 if kind == "int8" else 0.15)
            linear.weight.data = near
        x = torch.randn(2, 7, decoder_of(plain).hidden_size, generator=torch.Generator().manual_seed(0))
        for expected, given in zip(passed(plain, x), passed(ours, x), strict=True):
            assert torch.equal(expected, given)  # to the bit


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_parts_compute_the_same(kind, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what is traced is the question
    model, forwards = backbones.load("llava-interleave-7b", variant="tiny", quantized=kind).model, {}
    for length in (5, 8):
        x = torch.randn(2, length, decoder_of(model).hidden_size, generator=torch.Generator().manual_seed(length))
        expected = passed(model, x)
        with compiled_parts(model, forwards):
            for plain, compiled in zip(expected, passed(model, x), strict=True):
                assert torch.allclose(plain, compiled, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoders_linear_weights_alone_are_stored_so_and_take_a_half_or_a_quarter(kind):
    plain = backbones.load("idefics2-8b-base", variant="meta").model.to(torch.bfloat16)
    whole, linear = weight_bytes(plain), sum(module.weight.nbytes for module in quantizable(plain).values())
    assert whole == sum(parameter.nbytes for parameter in plain.parameters())
    quantize(plain, kind)
    share = {"int8": 0.5, "nf4": 0.25 + 1 / 128}[kind]  # of 16 bits: a value's, and a scale's for each 64 values
    assert weight_bytes(plain) == pytest.approx(whole - linear * (1 - share), rel=1e-3)
    assert MemoryOf("idefics2-8b-base", "bf16", kind).weights == pytest.approx(weight_bytes(plain), abs=1000)
    few = {name for name, p in plain.named_parameters() if not p.is_floating_point()}
    assert few == {name for name in few if ".text_model.layers." in name and name.endswith("_proj.weight")}
    assert len(few) == 32 * 7


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_from_a_folder_is_stored_as_it_is_read(kind, tiny, tmp_path):
    for name in ("idefics2-8b-base", "llava-interleave-7b"):
        tiny(name).model.save_pretrained(tmp_path / name)
        tiny(name).processor.save_pretrained(tmp_path / name)
        read = backbones.load(name, weights=tmp_path / name, quantized=kind)
        made = backbones.load(name, variant="tiny", quantized=kind)
        assert read.quantized == kind and read.dtype == torch.float32
        assert read.digest == backbones.load(name, weights=tmp_path / name).digest  # of the files
        for part in quantizable(tiny(name).model):
            assert torch.equal(*(dequantized(of.model.get_submodule(part)) for of in (read, made))), part
        assert weight_bytes(read.model) == weight_bytes(made.model) and not quantizable(read.model)
        assert not any(parameter.requires_grad for parameter in read.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_the_hubs_layout_is_stored_so_by_its_own_architecture(kind, tmp_path):
    name = f"folder:{tiny_hub.make('qwen2_vl', tmp_path)}"
    plain, ours = (backbones.load(name, quantized=given).model for given in ("none", kind))
    for part, linear in quantizable(plain).items():
        linear.weight.data = dequantized(ours.get_submodule(part)).to(linear.weight.dtype)
    x = torch.randn(1, 6, decoder_of(plain).hidden_size, generator=torch.Generator().manual_seed(0))
    for expected, given in zip(passed(plain, x), passed(ours, x), strict=True):
        assert torch.equal(expected, given)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_a_folder_holds_in_few_bits_are_taken_as_they_are(kind, tiny, tmp_path):
    name, places = "llava-interleave-7b", (tmp_path / "wide", tmp_path / "few")
    tiny(name).model.save_pretrained(places[0])
    for place in places:
        tiny(name).processor.save_pretrained(place)
    read = backbones.load(name, weights=places[0], quantized=kind)
    read.model.save_pretrained(places[1])
    again = backbones.load(name, weights=places[1])
    x = torch.randn(1, 5, decoder_of(read.model).hidden_size, generator=torch.Generator().manual_seed(0))
    for expected, given in zip(passed(read.model, x), passed(again.model, x), strict=True):
        assert torch.equal(expected, given)
    with pytest.raises(InputError, match="stored in few bits already. Set train.quantize to none"):
        backbones.load(name, weights=places[1], quantized=kind)


def test_what_is_missing_and_what_is_unknown_is_said_in_a_line(monkeypatch):
    with pytest.raises(InputError, match="unknown way to store weights 'int4'.*int8"):
        backbones.load("idefics2-8b-base", variant="tiny", quantized="int4")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="nf4 need the package bitsandbytes, which is missing. Install it: pip"):
        backbones.load("idefics2-8b-base", variant="tiny", quantized="nf4")
