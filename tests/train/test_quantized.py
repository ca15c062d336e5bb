"""Trials over a frozen decoder in 8 and in 4 bits: trained, packed, scored, answered, and known by their keys."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from pipeline import adapters, backbones
from pipeline.adapters.base import CONFIG_FILE
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.weights import is_quantized
from pipeline.config.load import BackboneSource, load
from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import read_file
from pipeline.evaluate.answerer import Answerer, load_backbone
from pipeline.plan.plan import pack_key, planned_trials, teacher_key
from pipeline.serve import Service
from pipeline.sweep.train import check_engines
from pipeline.train.workbench import Workbench
from tests.conftest import ROOT

KINDS = ("int8", "nf4")
METHODS = ("hificl", "mimic", "live", "lora", "prefix")


@pytest.fixture(scope="module")
def bench():
    return Workbench(device="cpu")


def trained(bench, requests):
    """Return each trial's losses by epoch; all train together."""
    losses = {request.key: [] for request in requests}
    try:
        for request in requests:
            bench.admit(request)
        while reports := bench.advance():
            for report in reports:
                if report.metrics is not None:
                    losses[report.key].append(report.metrics.train_loss)
    finally:
        for request in requests:
            bench.evict(request.key)
    return [losses[request.key] for request in requests]


def learnt(bench, request):
    """Return the losses of eight steps on one micro-batch."""
    bench.admit(request)
    try:
        (run,) = bench.loop.trials
        (step,) = bench.loop.next_steps(1)
        parts, parameters = [step[0][0]], list(run.adapter.parameters())
        optimizer, losses = torch.optim.AdamW(parameters, lr=run.config.learning_rate), []
        with adapters.attach(bench.resident(request).loaded.model, [run.adapter.eval()]) as pack:
            for _ in range(8):
                (of_part,) = bench.loop.losses(pack, parts)
                gradients = torch.autograd.grad(of_part["train_loss"], parameters, materialize_grads=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    assert gradient.isfinite().all()
                    parameter.grad = gradient
                optimizer.step()
                losses.append(of_part["train_loss"].item())
        return losses
    finally:
        bench.evict(request.key)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_learns_and_the_frozen_weights_stay(bench, trial, tmp_path, kind):
    requests = [trial(method, tmp_path, quantize=kind, learning_rate=1e-2) for method in METHODS]
    model = bench.resident(requests[0]).loaded.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert is_quantized(model)
    for request in requests:
        losses = learnt(bench, request)
        assert 0 < losses[-1] < 0.99 * losses[0], request.config.method
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_gives_what_each_trial_gives_alone(bench, trial, tmp_path, kind):
    given = {"quantize": kind, "epochs": 1, "num_train_samples": 8, "num_selection_samples": 2}
    methods = ("hificl", "mimic", "live", "lora-mini")
    together = [trial(method, tmp_path / "pack", seed=1, **given) for method in methods]
    packed = trained(bench, together)
    for method, of_pack in zip(methods, packed, strict=True):
        (alone,) = trained(bench, [trial(method, tmp_path / "alone", seed=1, **given)])
        assert of_pack == pytest.approx(alone, rel=1e-4), method


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_answers_over_what_it_was_scored_over(bench, trial, tmp_path, kind):
    request = trial("hificl", tmp_path, quantize=kind, epochs=1, num_train_samples=8, num_selection_samples=2)
    trained(bench, [request])
    evaluation = bench.score(request, EvaluationConfig(trial=request.key, num_samples=2))
    resident = bench.resident(request)
    folder = tmp_path / request.key / "adapter"
    assert read_file(folder / CONFIG_FILE)["extra"]["quantize"] == kind
    answerer = Answerer(folder, project=ROOT)
    manifest = resident.manifest(request)
    for sample, predicted in zip(manifest.splits["evaluation"], evaluation.predictions, strict=False):
        image = manifest.image_root / sample.images[0].path
        assert answerer.answer(image, sample.question)["answer"] == predicted.prediction
    model = resident.loaded.model  # in plain transformers: by the prompt that lies beside the adapter
    wrapped = adapters.wrap(model, adapters.load(folder, model), processor=resident.loaded.processor)
    with Image.open(image) as picture:
        asked = wrapped.ask(picture, sample.question, max_new_tokens=answerer.max_new_tokens)
    assert asked == predicted.prediction and wrapped.unwrap() is model
    given = {"project": ROOT, "root": tmp_path, "most_rows": 2, "most_waiting": 2}
    source = BackboneSource(weights=str(ROOT / "checkpoints/mini-idefics2"))
    service = Service("mini-idefics2", backbones.load_from("mini-idefics2", source), **given)
    refusal = f"was trained with quantize {kind}, this server has none.*--adapter mine={folder}`"
    with pytest.raises(InputError, match=refusal):
        service.add("mine", folder)
    quantized = load_backbone("mini-idefics2", ROOT, Answerer(folder, project=ROOT).origin)  # as that command has it
    service = Service("mini-idefics2", quantized, **given)
    service.add("mine", folder)
    assert list(service.served) == ["mine"]
    loaded, adapter = answerer._loaded
    assert loaded.quantized == kind and is_quantized(loaded.model)
    # behind a cache, token by token, as in one pass
    ids = torch.randint(20, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), adapters.attach(loaded.model, adapter):
        decoder, cache, states = decoder_of(loaded.model).decoder, None, []
        whole = decoder(input_ids=ids, use_cache=False).last_hidden_state
        for part in ids.split([4, 1, 1, 1, 1, 1], dim=1):
            out = decoder(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            states.append(out.last_hidden_state)
    assert torch.cat(states, 1) == pytest.approx(whole, abs=1e-4)


def test_it_is_part_of_the_key_and_trials_of_two_kinds_share_nothing(trial, tmp_path):
    plain, *few = (trial("mimic", tmp_path, quantize=kind).config for kind in ("none", *KINDS))
    assert plain.key == trial("mimic", tmp_path).key
    for of in (lambda config: config.key, lambda config: config.resident, pack_key, teacher_key):
        assert len({of(config) for config in (plain, *few)}) == 3
    assert plain.resident == (plain.backbone, plain.backbone_digest, "fp32")


def test_studies_vary_it_for_methods_that_train_and_those_that_do_not():
    study = "studies.own={title: o, backbones: [idefics2-8b-base], tasks: [okvqa], vary: {quantize: [none, nf4]}, "
    study += "methods: {hificl: {}, zero-shot: {}}}"
    params = load(ROOT / "params.yaml", [study], profile="real")
    planned = planned_trials(params, "own")
    pairs = sorted((config.method, config.quantize) for config in planned)
    assert pairs == [(method, kind) for method in ("hificl", "zero-shot") for kind in ("nf4", "none")]
    given = [study, "train.zero_stage=3", "train.world_size=2"]
    with pytest.raises(InputError, match="ZeRO-3 gathers parameters as numbers, which .* Set train.quantize to none"):
        planned_trials(load(ROOT / "params.yaml", given, profile="real"), "own")


def test_a_missing_package_is_said_before_work_starts(trial, tmp_path, monkeypatch):
    config = trial("hificl", tmp_path, quantize="int8").config
    assert "torch" in check_engines([config])
    monkeypatch.setattr("pipeline.backbones.weights.find_spec", lambda name: None)
    with pytest.raises(InputError, match="^train.quantize: weights in int8 need the package bitsandbytes"):
        check_engines([config])


def test_a_tuner_that_reads_the_weights_is_refused():
    name = "mini-idefics2"
    model = backbones.load_from(name, BackboneSource(weights=str(ROOT / "checkpoints" / name)), quantized="int8").model
    for tuner in ("hra", "olora"):
        with pytest.raises(InputError, match="computes with the frozen weights, which are in 8 or 4 bits"):
            adapters.create("peft", model, tuner=tuner)
    adapters.create("peft", model, tuner="dora")
