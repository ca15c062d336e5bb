"""Task and function vectors against the plainest computation of their equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline import backbones
from pipeline.backbones.decoder import decoder_of
from pipeline.baselines.vectors import TaskVectorOptions, edited_prefill, reinforce
from pipeline.core.errors import InputError
from pipeline.evaluate.generate import generate
from pipeline.evaluate.score import fitted
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import Encoded, draw_demos
from pipeline.resident.resident import Resident
from tests.adapters.test_states import precise_norms
from tests.baselines.conftest import SOURCE


@pytest.mark.parametrize("backbone", backbones.names())
@torch.no_grad()
def test_a_patched_last_layer_says_what_the_prompt_said(backbone, fit, manifest):
    """After the last layer only the last state decides, so any query's next token is the k-shot prompt's."""
    method = fit(backbone, "task-vector", num_shots=2, layer=0)
    last = method.spec.num_layers - 1
    (shots,) = method.shots(1, "task-vector")
    wanted = method.run([shots])
    queries = [(sample, []) for sample in manifest.splits["evaluation"][:1]]
    assert not torch.allclose(method.run(queries), wanted, atol=1e-4)
    with edited_prefill(method.spec.layers[last], method.edit(last)):
        torch.testing.assert_close(method.run(queries), wanted)


@pytest.mark.parametrize("backbone", ["idefics2-8b-base", "llava-interleave-7b", "idefics-9b"])
@pytest.mark.parametrize("name", ["task-vector", "function-vector"])
@torch.no_grad()
def test_generation_edits_the_last_prompt_token_and_no_other(backbone, name, fit, resident, manifest):
    """Batched, left-padded, cached generation against full forwards of one prompt that edit that one position."""
    options = {"num_effect_prompts": 1} if name == "function-vector" else {}
    method = fit(backbone, name, num_shots=2, num_prompts=2, layer=1, **options)
    method.vectors = getattr(method, "vectors", torch.zeros(1)) * 3  # large enough to be seen
    method.vector = getattr(method, "vector", torch.zeros(1)) * 300
    held = resident(backbone)
    loaded, root = held.loaded, manifest.image_root
    samples = manifest.splits["evaluation"]
    # of several lengths, so that most rows are padded
    demos = [manifest.splits["train"][: i % 3] for i in range(len(samples))]
    prompts = held.prompts(manifest, samples, demos, answer=False)
    options = {"max_new_tokens": 4, "visual_tokens": held.visual, "root": root, "stop_strings": ()}
    with method.edited():
        got = generate(loaded, prompts, **options)
    assert got != generate(loaded, prompts, **options)
    for request, text in zip(prompts, got, strict=True):
        images, ids, place = held.visual.get(request.images, root), list(request.input_ids), len(request) - 1

        def edit(module, args, output, place=place):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            h[:, place] = method.edit(1)(h[:, place])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = method.spec.layers[1].register_forward_hook(edit)
        for _ in range(4):
            step = Encoded(tuple(ids), request.images, 0, None, 0)
            logits = loaded.model(**collate([step], loaded, visual=images).model_inputs(loaded)).logits[0, -1]
            logits[loaded.never_generated] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] in loaded.eos_token_ids:
                break
        handle.remove()
        assert text == loaded.tokenizer.decode(ids[len(request) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("backbone", ["idefics2-8b-base", "llava-interleave-7b"])
@torch.no_grad()
def test_all_heads_together_are_the_mean_attention_output(backbone, fit):
    """The sum over every head of W_O times its mean output is the mean of the layers' attention outputs."""
    spec = fit(backbone, "task-vector", num_shots=2, layer=0).spec
    everything = spec.num_layers * spec.num_heads
    method = fit(backbone, "function-vector", num_shots=2, num_prompts=3, num_effect_prompts=1, layer=0,
                 num_heads=everything)  # fmt: skip
    seen = []
    hooks = [a.register_forward_hook(lambda m, args, out: seen.append(out[0][0, -1])) for a in spec.attentions]
    for shots in method.shots(3, "function-vector"):
        method.run([shots])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(method.vector, torch.stack(seen).sum(0) / 3)
    assert len(method.found["heads"]) == everything


@torch.no_grad()
def test_effects_are_those_of_one_head_replaced_alone(fit, resident, manifest):
    """The indirect effect of each head, by hand: another answers' order, one head's last output replaced."""
    method = fit("idefics2-8b-base", "function-vector", num_shots=3, num_prompts=2, num_effect_prompts=1, layer=0,
                 num_heads=4)  # fmt: skip
    means = method.mean_outputs()
    (plain_shots,) = method.shots(1, "function-vector effects")
    query, demos = method._shuffled(plain_shots, 0)
    assert sorted(d.target for d in demos) == sorted(d.target for d in plain_shots[1])
    assert [d.sample_id for d in demos] == [d.sample_id for d in plain_shots[1]]
    loaded = resident("idefics2-8b-base").loaded
    text = " " + " ".join(query.target.split()) + "\n"
    answer = loaded.tokenizer(f"Answer:{text}", add_special_tokens=False).input_ids
    answer = answer[len(loaded.tokenizer("Answer:", add_special_tokens=False).input_ids)]
    size, found = method.spec.head_dim, {}
    base = method.run([(query, demos)]).softmax(-1)[0, answer]
    for layer, output in enumerate(method.outputs):
        for head in range(method.spec.num_heads):

            def put(module, args, head=head, layer=layer):
                x = args[0].clone()
                x[0, -1, head * size : (head + 1) * size] = means[layer, head]
                return (x,)

            handle = output.register_forward_pre_hook(put)
            found[layer, head] = (method.run([(query, demos)]).softmax(-1)[0, answer] - base).item()
            handle.remove()
    best = sorted(found, key=found.__getitem__, reverse=True)[:4]
    got = {(row["layer"], row["head"]): row["effect"] for row in method.found["heads"]}
    assert sorted(got.values(), reverse=True) == pytest.approx([found[h] for h in best], abs=1e-6)


@pytest.mark.parametrize(("scores", "best"), [([1.0, 3.0], 1), ([3.0, 3.0], 0)])  # the first of equals
def test_the_layer_is_the_best_on_the_selection_split(scores, best, fit, manifest):
    method = fit("idefics2-8b-base", "task-vector", num_shots=2, layer=0)
    assert method.spec.num_layers == len(scores)
    asked = []

    def score(samples):
        asked.append(samples)
        return scores[len(asked) - 1]

    method.setting = replace(method.setting, score=score, selection=manifest.splits["selection"])
    assert method._best_layer() == best
    assert asked == [manifest.splits["selection"]] * method.spec.num_layers
    assert TaskVectorOptions().selects() and not TaskVectorOptions(layer=0).selects()


def test_a_layer_that_does_not_exist_is_refused(fit):
    with pytest.raises(InputError, match="layer: layer 99 is asked for, the decoder has"):
        fit("idefics2-8b-base", "task-vector", num_shots=2, layer=99)


@pytest.fixture
def precise(config, manifest):
    """A method fitted on Idefics2 in fp64, and the fp64 logits [T, V] of a sample's open prompt."""

    def make(name, **options):
        host = Resident(config("idefics2-8b-base", "zero-shot"), SOURCE, None, "cpu")
        host.loaded.model.double()
        method = fitted(config("idefics2-8b-base", name, **options), host, manifest)
        (prompt,) = host.prompts(manifest, manifest.splits["evaluation"][:1], [[]], answer=False)

        def ask():
            return host.loaded.model(**host.batch([prompt], manifest).model_inputs(host.loaded)).logits[0]

        return method, ask

    with precise_norms():
        yield make


@pytest.mark.parametrize("point", ["mlp", "residual"])
@torch.no_grad()
def test_an_in_context_vector_is_its_equation(point, precise, manifest):
    method, ask = precise("icv", num_shots=4, strength=0.5, point=point)
    host, by_id = method.setting.host, {sample.sample_id: sample for sample in manifest.splits["train"]}
    layers = decoder_of(host.loaded.model).layers
    changes = []
    for i in draw_demos(list(by_id), "", 4, 0, draw="icv"):
        ends = []
        for answer in (False, True):
            seen = []
            hooks = [layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out[0, -1]))
                     for layer in layers]  # fmt: skip
            prompts = host.prompts(manifest, [by_id[i]], [[]], answer=answer)
            host.loaded.model.model(**host.batch(prompts, manifest).model_inputs(host.loaded))
            for hook in hooks:
                hook.remove()
            ends.append(torch.stack(seen))
        changes.append((ends[1] - ends[0]).flatten())
    changes = torch.stack(changes)
    direction = torch.linalg.eigh(changes.T @ changes).eigenvectors[:, -1]
    direction = (direction * torch.sign((changes @ direction).sum())).view(len(layers), -1)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(method.directions, direction, rtol=0, atol=1e-11)

    def turned(x, v):
        moved = x / x.norm(dim=-1, keepdim=True) + 0.5 * v
        return moved / moved.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)

    plain = ask()
    with method.edited():
        found = ask()
    hooks = [
        (layer.mlp if point == "mlp" else layer).register_forward_hook(lambda m, args, out, v=v: turned(out, v))
        for layer, v in zip(layers, direction, strict=True)
    ]
    torch.testing.assert_close(found, ask(), rtol=0, atol=1e-11)
    for hook in hooks:
        hook.remove()
    assert (found - plain).abs().max() > 1e-3 and torch.equal(ask(), plain)


@torch.no_grad()
def test_a_multimodal_task_vector_is_its_equation(precise, manifest):
    method, ask = precise("mtv", num_shots=2, num_prompts=3, num_steps=2, num_draws=4)
    host, spec = method.setting.host, method.spec
    seen = []
    hooks = [a.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0, -1])) for a in spec.attentions]
    for shots in method.shots(3, "mtv"):
        method.run([shots])
    for hook in hooks:
        hook.remove()
    means = torch.stack(seen).view(3, spec.num_layers, spec.num_heads, spec.head_dim).mean(0)
    torch.testing.assert_close(method.means, means, rtol=0, atol=1e-11)
    assert method.found["heads"] and {(r["layer"], r["head"]) for r in method.found["heads"]} == set(
        map(tuple, method.heads.nonzero().tolist())
    )
    method.heads = torch.zeros(spec.num_layers, spec.num_heads, dtype=torch.bool)
    method.heads[0, 1] = method.heads[1, 0] = method.heads[1, 2] = True
    plain = ask()
    with method.edited():
        found = ask()

    def put(module, args, layer, heads):
        x = args[0].clone()
        for head in heads:
            x[0, -1, head * spec.head_dim : (head + 1) * spec.head_dim] = means[layer, head]
        return (x,)

    hooks = [
        spec.attentions[i].o_proj.register_forward_pre_hook(lambda m, args, i=i, heads=heads: put(m, args, i, heads))
        for i, heads in ((0, [1]), (1, [0, 2]))
    ]
    expected = ask()
    sample = manifest.splits["selection"][0]
    (closed,) = host.prompts(manifest, [sample], [[]], answer=True)
    lost = -method.run([(sample, [])]).log_softmax(-1)[0, closed.input_ids[closed.answer_span[0]]]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert (found - plain)[-1].abs().max() > 1e-3 and torch.equal(found[:-1], plain[:-1])
    sets = torch.stack([method.heads, torch.zeros_like(method.heads)])
    of_sets = method.losses((sample, []), sets)
    torch.testing.assert_close(of_sets[0], lost, rtol=0, atol=1e-11)
    assert of_sets[1] != of_sets[0]


def test_reinforce_finds_the_set_whose_loss_is_low():
    good = torch.tensor([[True, False, True], [False, False, True]])
    steps = []

    def losses(step, sets):
        steps.append(sets.shape)
        return (sets != good).flatten(1).sum(1).double()

    chances = reinforce(losses, (2, 3), 60, 16, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(chances > 0.5, good) and steps == [(16, 2, 3)] * 60
    once = []
    reinforce(lambda step, sets: once.append(sets) or losses(step, sets), (2, 3), 1, 4, 0.1,
              torch.Generator().manual_seed(1))  # fmt: skip
    theta = torch.full((2, 3), -1.0, requires_grad=True)
    lost = losses(0, once[0])
    chance = theta.sigmoid()
    likelihood = torch.where(once[0], chance, 1 - chance).log().flatten(1).sum(1)
    ((lost - lost.mean()).float() * likelihood).mean().backward()
    stepped = theta.detach() - 0.1 * theta.grad.sign() * (theta.grad != 0)  # Adam's first step
    again = reinforce(losses, (2, 3), 1, 4, 0.1, torch.Generator().manual_seed(1))
    torch.testing.assert_close(again, stepped.sigmoid(), rtol=0, atol=1e-5)
