"""What MimIC's alignment compares: each state of each layer, against hooks and a mean of squares written by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline import adapters
from pipeline.adapters.attach import attach
from pipeline.adapters.pack import Pack
from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import InputError
from pipeline.data.manifest import training_samples
from pipeline.prompts.prompt import Encoded
from pipeline.records.store import TrialStore
from pipeline.train.teacher import Demonstrations
from pipeline.train.workbench import Workbench
from tests.adapters.test_states import precise_norms
from tests.train.test_loop import train

COMPARED = [
    ({}, "mlp"),
    ({"point": "residual"}, "residual"),
    ({"alignment": "attention"}, "attention"),
    ({"alignment": "attention", "point": "residual"}, "residual-mid"),
]


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(device="cpu")


@torch.no_grad()
def by_hand(resident, manifest, prompt, state):
    """Return a state of every layer, [L, T, D], of one prompt, by hooks on modules that are named here."""
    seen: list[torch.Tensor] = []
    hooks = []
    for layer in decoder_of(resident.loaded.model).layers:
        if state == "residual-mid":
            norm = layer.post_attention_layernorm
            hooks.append(norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])))
        elif state == "attention":
            hooks.append(layer.self_attn.register_forward_hook(lambda _, args, out: seen.append(out[0][0])))
        else:
            module = layer.mlp if state == "mlp" else layer
            hooks.append(module.register_forward_hook(lambda _, args, out: seen.append(out[0])))
    inputs = resident.batch([prompt], manifest).model_inputs(resident.loaded)
    resident.loaded.model.model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize(("options", "state"), COMPARED, ids=[state for _, state in COMPARED])
def test_the_loss_is_the_mean_of_squares_over_layers_and_the_querys_positions(bench, trial, tmp_path, options, state):
    bench.admit(trial("mimic", tmp_path, micro_batch_size=3, accumulation=1, **options))
    (run,) = bench.loop.trials
    resident = bench.loop.resident
    model = resident.loaded.model
    for parameter in run.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(5))
    (part,) = bench.loop.next_steps(1)[0][0]
    pack = Pack(run.adapter)
    with attach(model, pack), torch.no_grad():
        (found,) = bench.loop.losses(pack, [part])
    samples = [run.samples[i] for i in part.ids]
    shots = [run.teacher.demonstrations(sample, 1) for sample in samples]
    apart = []
    for one, demonstrations, sample in zip(part.ids, shots, samples, strict=True):
        alone = run.prompts[one]
        (behind,) = resident.prompts(run.manifest, [sample], [demonstrations], answer=True)
        with attach(model, run.adapter):
            mine = by_hand(resident, run.manifest, alone, state)
        its = by_hand(resident, run.manifest, behind, state)
        m = min(len(alone) - alone.query_start, len(behind) - behind.query_start)
        m = next(n for n in range(m, 0, -1) if alone.input_ids[-n:] == behind.input_ids[-n:])
        apart.append((mine[:, -m:] - its[:, -m:]).square().mean())
    bench.evict(run.config.key)
    expected = torch.stack(apart).mean()
    torch.testing.assert_close(found["alignment_loss"], expected, rtol=1e-4, atol=1e-7)


def test_a_target_holds_the_querys_states_alone(bench, trial, tmp_path):
    bench.admit(trial("mimic", tmp_path, micro_batch_size=2, accumulation=1))
    (run,) = bench.loop.trials
    bench.loop.resident.targets.clear()
    (part,) = bench.loop.next_steps(1)[0][0]
    layers, width = decoder_of(bench.loop.resident.loaded.model).num_layers, run.adapter.backbone.hidden_size
    held = {target.hidden.untyped_storage().data_ptr(): target.hidden.untyped_storage() for target in part.targets}
    tokens = sum(target.hidden.shape[1] for target in part.targets)
    assert 0 < tokens <= sum(len(run.prompts[i]) for i in part.ids)
    assert sum(storage.nbytes() for storage in held.values()) == 4 * layers * width * tokens
    bench.evict(run.config.key)


@pytest.mark.parametrize(("method", "options"), [("mimic", {}), ("live", {}), ("hificl", {"teacher": True})])
def test_a_trial_of_before_there_was_a_point_trains_as_it_did(bench, trial, tmp_path, method, options):
    today, residual = (trial(method, tmp_path, epochs=1, **options, **more) for more in ({}, {"point": "residual"}))
    old = {name: value for name, value in residual.config.options.items() if name != "point"}
    config = residual.config.model_copy(update={"options": old})
    assert len({one.key for one in (config, today.config, residual.config)}) == 3
    before = type(residual)(config=config, folder=str(tmp_path / "old"), manifest=residual.manifest,
                            source=residual.source)  # fmt: skip
    lost = [train(bench, [request])[request.key][0].train_loss for request in (before, residual, today)]
    assert lost[0] == lost[1] != lost[2]


def test_a_decoder_without_the_state_is_refused_before_anything_is_trained(trial, tmp_path):
    bench = Workbench(device="cpu")
    request = trial("mimic", tmp_path)
    layer = decoder_of(bench.resident(request).loaded.model).layers[1]
    layer.second = torch.nn.Linear(4, 4)
    with pytest.raises(InputError, match="2 feed-forward modules .mlp, second.*point: residual"):
        bench.admit(request)
    bench.admit(trial("mimic", tmp_path, point="residual"))


@pytest.fixture
def shown(trial, tmp_path):
    """Three demonstrations and a backbone in fp64."""
    request = trial("ct-kv", tmp_path, num_shots=3)
    resident = Workbench(device="cpu").resident(request)
    resident.loaded.model.double()
    manifest = resident.manifest(request)
    pool = training_samples(manifest, request.config)
    demonstrations = Demonstrations(resident, manifest, pool, request.config)
    assert len({sample.sample_id for sample in demonstrations.samples}) == 3
    assert {sample.sample_id for sample in demonstrations.samples} < {sample.sample_id for sample in pool}
    again = Demonstrations(resident, manifest, pool, request.config.model_copy(update={"seed": 1}))
    assert again.samples != demonstrations.samples
    with precise_norms():
        yield demonstrations


@torch.no_grad()
def test_a_prefix_that_starts_from_demonstrations_is_a_prompt_behind_them(shown, tmp_path):
    resident, manifest, samples = shown.resident, shown.manifest, shown.samples
    loaded, model = resident.loaded, resident.loaded.model
    adapter = adapters.create("ct-kv", model).double()
    adapter.start(shown)
    (behind,) = resident.prompts(manifest, samples[-1:], [samples[:-1]], answer=True)
    (alone,) = resident.alone(manifest, manifest.splits["selection"][:1], answer=True)
    both = Encoded((*behind.input_ids, *alone.input_ids), (*behind.images, *alone.images), 0, None, 0)
    positions = torch.arange(-len(behind), len(alone))[None]
    expected = model(**{**resident.batch([both], manifest).model_inputs(loaded), "position_ids": positions}).logits
    inputs = resident.batch([alone], manifest).model_inputs
    with attach(model, adapter):
        found = model(**inputs(loaded)).logits
    torch.testing.assert_close(found, expected[:, len(behind) :], rtol=0, atol=1e-11)
    assert (model(**inputs(loaded)).logits - found).abs().max() > 1e-3
    few = adapters.create("ct-kv", model, num_virtual_tokens=5)
    few.start(shown)
    torch.testing.assert_close(few.keys, adapter.keys[:, :, -5:].float())
    adapter.float().save_pretrained(tmp_path / "saved")
    loaded_again = adapters.load(tmp_path / "saved", model)
    assert loaded_again.num_virtual == len(behind)
    assert all(map(torch.equal, loaded_again.parameters(), adapter.parameters()))


@torch.no_grad()
def test_a_context_vector_is_the_mean_of_the_demonstrations_last_states(shown, tmp_path):
    resident, model = shown.resident, shown.resident.loaded.model
    adapter = adapters.create("i2cl", model).double()
    adapter.start(shown)
    prompts = resident.alone(shown.manifest, shown.samples, answer=True)
    for state, part in adapter.part.items():
        each = [by_hand(resident, shown.manifest, prompt, state)[:, -1] for prompt in prompts]
        torch.testing.assert_close(part.context, sum(each) / 3, rtol=0, atol=1e-11)
    adapter.float().save_pretrained(tmp_path / "saved")
    again = adapters.load(tmp_path / "saved", model)
    assert all(torch.equal(x, adapter.state_dict()[name]) for name, x in again.state_dict().items())


def test_where_prompts_cannot_stand_behind_others_it_is_said(shown, monkeypatch):
    monkeypatch.setattr(type(shown.resident.loaded.family), "shares_prefix", False)
    with pytest.raises(InputError, match="cannot be put before other prompts. Use the method prefix"):
        shown.cache()


def test_what_a_start_costs_is_counted_once(bench, trial, tmp_path):
    request = trial("i2cl", tmp_path)
    bench.admit(trial("prefix", tmp_path / "other"))
    bench.admit(request)
    other, run = bench.loop.trials
    assert run._epoch.seconds > 0 == other._epoch.seconds and run.flops[1] > 0 == other.flops[1]
    bench.evict(other.config.key)
    bench.advance()
    bench.evict(request.key)
    bench.admit(request)
    (again,) = bench.loop.trials
    assert again._epoch.seconds == 0 and again.flops == run.flops
    bench.advance()
    step, start = run.flops
    assert TrialStore(tmp_path).done(request.key).train_flops == step * 2 * len(run.samples) + start


def test_a_start_is_the_same_bits_alone_and_beside_others(bench, trial, tmp_path):
    states = []
    for place, beside in (("alone", None), ("beside", trial("mimic", tmp_path)), ("again", None)):
        if beside is not None:
            bench.admit(beside)
            bench.advance()
        request = trial("ct-kv", tmp_path / place, seed=1 if place == "again" else 0)
        bench.admit(request)
        states.append(bench.loop.trials[-1].adapter.keys.detach().clone())
        for run in list(bench.loop.trials):
            bench.evict(run.config.key)
    assert torch.equal(states[0], states[1])
    assert states[2].shape != states[0].shape or not torch.equal(states[2], states[0])  # of another seed
