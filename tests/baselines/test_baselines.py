"""Every method without training: seeded, honest about the query, and without a trace in the model afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline import backbones
from pipeline.baselines import baselines
from pipeline.config.load import BackboneSource, TrialRequest
from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import InputError
from pipeline.evaluate.generate import WHOLE, Decoding, predict
from pipeline.evaluate.score import answer, score
from pipeline.resident.resident import ImageFeatures, image_features
from pipeline.resident.visual_tokens import VisualTokens

BACKBONES = ["idefics2-8b-base", "idefics-9b", "llava-interleave-7b", "llava-v1.6-mistral-7b", "qwen3-vl-8b"]
SMALL = {
    "num_shots": 2, "num_prompts": 2, "num_effect_prompts": 1, "num_heads": 3, "num_steps": 2, "num_draws": 3,
    "num_chunks": 2,
}  # fmt: skip


def small(method: str) -> dict[str, int]:
    return {name: value for name, value in SMALL.items() if name in baselines.get(method).Options.model_fields}


def answers(method, resident, manifest, **options):
    samples = manifest.splits["evaluation"]
    shots = dict(zip([s.sample_id for s in samples], method.demonstrations(samples), strict=True))
    with method.edited():
        decoding = Decoding(max_new_tokens=4, **options)
        return predict(resident, manifest, samples, decoding, lambda s: shots[s.sample_id], chunks=method.chunks)


@pytest.mark.parametrize("method", baselines.names())
@pytest.mark.parametrize("backbone", BACKBONES)
def test_battery(backbone, method, fit, resident, manifest):
    """Answers do not depend on batches, two fits agree, the model is untouched afterwards."""
    held = resident(backbone)
    untouched = answers(fit(backbone, "zero-shot"), held, manifest)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in held.loaded.model.modules())
    first, second = (fit(backbone, method, **small(method)) for _ in range(2))
    assert first.found == second.found
    together = answers(first, held, manifest)
    assert together == answers(second, held, manifest, batch_size=1)
    samples = manifest.splits["evaluation"] + manifest.splits["train"][:2]
    shown = first.demonstrations(samples)
    assert shown == second.demonstrations(samples)
    assert {len(demos) for demos in shown} == ({2} if first.shows_demonstrations else {0})
    for query, demos in zip(samples, shown, strict=True):
        ids = [demo.sample_id for demo in demos]
        assert query.sample_id not in ids and len(set(ids)) == len(ids)
        assert set(ids) <= {sample.sample_id for sample in manifest.splits["train"]}
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in held.loaded.model.modules()) == hooks
    assert answers(fit(backbone, "zero-shot"), held, manifest) == untouched


def test_random_demonstrations_follow_the_seed(fit, manifest):
    queries = manifest.splits["evaluation"]
    by_seed = [fit("idefics2-8b-base", "icl-k", seed, num_shots=4).demonstrations(queries) for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2]


def test_shuffled_demonstrations_have_their_texts_and_anothers_images(fit, manifest):
    queries = manifest.splits["evaluation"]
    plain, shuffled = (
        fit("idefics2-8b-base", method, num_shots=3).demonstrations(queries) for method in ("icl-k", "icl-k-shuffled")
    )
    for own, moved in zip(plain, shuffled, strict=True):
        assert [replace(demo, images=()) for demo in moved] == [replace(demo, images=()) for demo in own]
        assert [demo.images for demo in moved] == [own[1].images, own[2].images, own[0].images]
    with pytest.raises(InputError, match="num_shots"):
        fit("idefics2-8b-base", "icl-k-shuffled", num_shots=1)


@pytest.mark.parametrize("backbone", backbones.names())
def test_features_do_not_depend_on_their_batch(backbone, resident, manifest):
    """One vector an image from the tower's own last states, whatever the other images are."""
    held = resident(backbone)
    images = [sample.images[0] for sample in manifest.splits["train"]]
    together = torch.stack(ImageFeatures(held.loaded, None).get(images, manifest.image_root))
    alone = torch.stack([ImageFeatures(held.loaded, None).get([i], manifest.image_root)[0] for i in images])
    torch.testing.assert_close(together, alone)
    assert together.dim() == 2 and len(torch.unique(together, dim=0)) == len({i.sha256 for i in images})


def test_features_are_kept_beside_the_visual_tokens(resident, manifest, tmp_path):
    loaded = resident("idefics2-8b-base").loaded
    visual = VisualTokens(loaded, tmp_path)
    image = manifest.splits["train"][0].images[0]
    store = image_features(visual)
    assert store is image_features(visual)
    first = store.get([image], manifest.image_root)[0]
    tokens = visual.get([image], manifest.image_root)[0]
    again = image_features(VisualTokens(loaded, tmp_path))
    assert torch.equal(again.get([image], manifest.image_root)[0], first) and again.computed == 0
    assert first.dim() == 1 and tokens.dim() == 2


def test_rices_is_exact(fit, manifest):
    """The k nearest by cosine, against the plainest computation; nearest last, the query's own image left out."""
    method = fit("idefics2-8b-base", "rices-k", num_shots=3)
    pool = manifest.splits["train"]
    queries = manifest.splits["evaluation"] + pool
    features = method.setting.features
    for query, shown in zip(queries, method.demonstrations(queries), strict=True):
        mine = features(query.images)[0].double()
        by_image = {}
        for sample in pool:
            by_image.setdefault(sample.images[0].sha256, sample)
        distance = {
            image: 1 - torch.cosine_similarity(mine, features(sample.images)[0].double(), dim=0).item()
            for image, sample in by_image.items()
            if image != query.images[0].sha256
        }
        nearest = sorted(distance, key=distance.__getitem__)[:3]
        assert [demo.images[0].sha256 for demo in shown] == nearest[::-1]


def test_rices_says_when_the_pool_is_too_small(fit, manifest):
    method = fit("idefics2-8b-base", "rices-k", num_shots=8)
    with pytest.raises(InputError, match="8 demonstrations are asked for, the pool has"):
        method.demonstrations(manifest.splits["train"][:1])


@pytest.mark.parametrize(("method", "options", "scored"), [("icl-k", {"num_shots": 2}, 4), ("zero-shot", {}, 5)])
def test_an_incomplete_few_shot_batch_is_left_out_on_request(method, options, scored, config, resident, manifest):
    manifest.save(manifest.image_root / "manifest.json")
    trial = config("idefics2-8b-base", method, **options)
    request = TrialRequest(trial, "", str(manifest.image_root / "manifest.json"), BackboneSource(variant="tiny"))
    asked = EvaluationConfig(trial=trial.key, drop_incomplete_batch=2, max_new_tokens=2)
    host = resident("idefics2-8b-base")
    record = score(host, request, asked, answer(host, [request], asked, WHOLE, 64))
    assert record.num_samples == len(record.predictions) == scored
    every = asked.model_copy(update={"drop_incomplete_batch": None})
    whole = score(host, request, every, answer(host, [request], every, WHOLE, 64))
    assert whole.num_samples == 5


@torch.no_grad()
def test_chunks_write_one_answer_by_the_product_of_their_probabilities(fit, resident, manifest):
    method, held = fit("idefics2-8b-base", "parallel-icl", num_shots=5, num_chunks=2), resident("idefics2-8b-base")
    loaded, samples = held.loaded, manifest.splits["evaluation"]
    found = predict(held, manifest, samples, Decoding(max_new_tokens=4, batch_size=4), chunks=method.chunks)
    weighed = []
    for sample in samples:
        chunks = method.chunks(sample)
        drawn = {demo.sample_id for demo in method.demonstrations([sample])[0]}
        assert sum(len(demos) for _, demos in chunks) == 5
        assert {demo.sample_id for _, demos in chunks for demo in demos} == drawn
        assert sum(weight for weight, _ in chunks) == pytest.approx(1)
        weighed.append(chunks[0][0])
        prompts = held.prompts(manifest, [sample] * 2, [demos for _, demos in chunks], answer=False)
        written: list[int] = []
        for _ in range(4):
            total = 0.0
            for (weight, _), prompt in zip(chunks, prompts, strict=True):
                longer = replace(prompt, input_ids=(*prompt.input_ids, *written))
                logits = loaded.model(**held.batch([longer], manifest).model_inputs(loaded)).logits[0, -1]
                logits[loaded.never_generated] = -torch.inf
                total = total + weight * logits.log_softmax(-1)
            written.append(int(total.argmax()))
            if written[-1] in loaded.eos_token_ids:
                break
        text = loaded.tokenizer.decode(written, skip_special_tokens=True)
        assert found[sample.sample_id] == text.partition("\n")[0].strip()
    assert len(set(weighed)) > 1
    whole = {**found}
    assert whole == predict(held, manifest, samples, Decoding(max_new_tokens=4, batch_size=1), chunks=method.chunks)
    with pytest.raises(InputError, match=r"do it greedily. Set evaluate.num_beams to 1"):
        predict(held, manifest, samples, Decoding(num_beams=3), chunks=method.chunks)


def test_one_chunk_is_in_context_learning(fit, resident, manifest):
    held, samples = resident("llava-interleave-7b"), manifest.splits["evaluation"]
    one = fit("llava-interleave-7b", "parallel-icl", num_shots=2, num_chunks=1)
    plain = fit("llava-interleave-7b", "icl-k", num_shots=2)
    shown = dict(zip([s.sample_id for s in samples], plain.demonstrations(samples), strict=True))
    decoding = Decoding(max_new_tokens=4)
    together = predict(held, manifest, samples, decoding, chunks=one.chunks)
    assert together == predict(held, manifest, samples, decoding, lambda s: shown[s.sample_id])
