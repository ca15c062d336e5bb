"""Methods without training on a text decoder: demonstrations by their text, prompts whose common part is run once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from pipeline import adapters, backbones, methods
from pipeline.config.load import BackboneSource
from pipeline.config.schema import TaskFile
from pipeline.config.trial import TrialConfig
from pipeline.core import registry
from pipeline.core.errors import InputError
from pipeline.evaluate import generate as generation
from pipeline.evaluate.generate import common_head, generate
from pipeline.evaluate.score import fitted
from pipeline.resident.resident import Resident
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks import tasks
from pipeline.train.cost import flops_per_sample
from tests.support import tiny_hub

VERBS = ("try", "cry", "fry", "dry", "walk", "talk", "jump", "bump", "call", "fall", "look", "cook", "open", "end")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("verbs")
    rows = [f'{{"input": "{verb}", "output": "{verb}ed"}}' for verb in VERBS]
    (root / "verbs.jsonl").write_text("\n".join(rows))
    registry.declare("task", {"verbs": (TaskFile(file="verbs.jsonl", prompt="Q: {question}\nA:"), root)})
    yield draw_manifest(tasks.get("verbs"), root, seed=0, num_train=10, num_selection=2, num_evaluation=2)
    registry.declare("task", {})


@pytest.fixture(scope="module")
def fit(manifest, tmp_path_factory):
    name = f"folder:{tiny_hub.make('llama', tmp_path_factory.mktemp('hub') / 'llama')},chat=false"
    source = BackboneSource.spelled(name)

    def config(method: str, **options) -> TrialConfig:
        return TrialConfig(
            backbone=name, backbone_digest=backbones.digest_of(name, source), task="verbs",
            manifest_digest=manifest.digest, method=method, options=methods.parse(method, options).plain(),
            num_train_samples=10, seed=0, num_selection_samples=2 if "vector" in method else 0,
        )  # fmt: skip

    resident = Resident(config("zero-shot"), source, None, "cpu")
    return lambda method, **options: fitted(config(method, **options), resident, manifest)


def test_the_nearest_texts_are_shown_nearest_last(fit, manifest):
    method, pool = fit("rices-k", num_shots=3), manifest.splits["train"]
    queries = [*manifest.splits["evaluation"], *pool]
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    of_pool = letters.fit_transform([sample.question for sample in pool]).toarray()
    for query, shown in zip(queries, method.demonstrations(queries), strict=True):
        near = of_pool @ letters.transform([query.question]).toarray()[0]  # rows are of length 1
        others = [i for i, sample in enumerate(pool) if sample.question != query.question]
        order = sorted(others, key=lambda i: (-round(near[i], 9), i))
        assert [demo.question for demo in shown] == [pool[i].question for i in order[:3]][::-1]
    cry = replace(pool[0], sample_id=-1, question="spry")
    assert method.demonstrations([cry])[0][-1].question.endswith("ry")
    with pytest.raises(InputError, match="10 demonstrations are asked for, the pool has 9 texts beside the query's"):
        fit("rices-k", num_shots=10).demonstrations(pool[:1])


def test_texts_have_no_images_to_shuffle(fit):
    with pytest.raises(InputError, match="no images to shuffle.*Use icl-k"):
        fit("icl-k-shuffled", num_shots=2)


@torch.no_grad()
def test_heads_effects_behind_kept_keys_are_those_of_whole_prompts(fit):
    method = fit("function-vector", num_shots=3, num_prompts=2, num_effect_prompts=2, num_heads=3, layer=1)
    (shots,) = method.shots(1, "any")
    ask = method._repeated(shots)
    for copies in (1, 4, 4, 1):
        torch.testing.assert_close(ask(copies), method.run([shots] * copies), atol=1e-4, rtol=1e-4)
    means = method.mean_outputs()
    kept = method._effect(shots, means)
    method._repeated = lambda shots: lambda copies: method.run([shots] * copies)
    torch.testing.assert_close(kept, method._effect(shots, means), atol=1e-6, rtol=0)
    assert kept.abs().max() > 2e-5


def test_demonstrations_that_all_queries_share_are_run_once(fit, manifest, monkeypatch):
    method = fit("icl-k", num_shots=4, demonstrations="fixed")
    host, queries = method.setting.host, manifest.splits["evaluation"]
    prompts = host.prompts(manifest, queries, method.demonstrations(queries), answer=False)
    head = common_head(prompts, host.loaded.image_token_id)
    assert head is not None and len(head) >= prompts[0].query_start
    write = {"max_new_tokens": 4, "visual_tokens": host.visual, "stop_strings": ()}
    shared = generate(host.loaded, prompts, **write)
    monkeypatch.setattr(generation, "common_head", lambda requests, image: None)
    assert shared == generate(host.loaded, prompts, **write)


def test_what_a_text_decoder_costs_is_counted(fit, manifest):
    """One sample's step of LoRA by hand, without its own products: 2 layers, 4 heads of 16 over 2, FFN of 48."""
    host = fit("zero-shot").setting.host
    adapter = adapters.create("lora", host.loaded.model, rank=4, targets=["q_proj"])
    prompts = host.prompts(manifest, manifest.splits["train"][:1], [[]], answer=True)
    tokens, (start, end) = len(prompts[0]), prompts[0].answer_span
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 48)
    head = host.loaded.model.get_output_embeddings().weight.numel()
    frozen = 4 * weights * tokens + 12 * 2 * 64 * tokens**2 + 4 * head * (end - start)
    assert flops_per_sample(adapter, host, prompts, 0, manifest, shots=0) == (frozen, 0.0)
