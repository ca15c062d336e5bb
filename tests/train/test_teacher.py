"""What MimIC's alignment compares: each state of each layer, against hooks and a mean of squares written by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.adapters.attach import attach
from pipeline.adapters.pack import Pack
from pipeline.backbones.decoder import decoder_of
from pipeline.core.errors import InputError
from pipeline.train.workbench import Workbench
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
