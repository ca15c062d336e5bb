"""Training and decoding on a simulated GPU: how often the host waits for it, and how many operators a step takes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from pipeline import adapters, backbones, methods
from pipeline.backbones.decoder import decoder_of
from pipeline.config.load import BackboneSource, TrialRequest
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest
from pipeline.plan.plan import pack_key
from pipeline.train import engine
from pipeline.train.loop import TrainingLoop
from pipeline.train.trial_run import TrialRun
from pipeline.train.workbench import Workbench
from tests.support.simulated_cuda import NAME, simulated_gpu

HIFICL, MIMIC, LIVE = ("hificl", {}), ("mimic", {}), ("live", {})
LORA = ("lora", {"scope": "decoder"})
# backbone, trials of a pack, most waits and operators of a step with visual tokens at hand (two micro-batches)
STEPS = [
    ("idefics2-8b-base", [HIFICL], 1, 1300),
    ("idefics2-8b-base", [MIMIC], 1, 1400),
    ("idefics2-8b-base", [LIVE], 1, 1220),
    ("idefics2-8b-base", [LORA], 1, 1800),
    ("idefics2-8b-base", [HIFICL, MIMIC, LIVE, ("hificl", {"rank": 4, "teacher": True})], 1, 2600),
    ("idefics2-8b-base", [LORA, ("lora", {"scope": "decoder", "rank": 8})], 1, 2920),
    ("llava-interleave-7b", [HIFICL], 1, 1250),
]
REFUSED = {
    ("idefics-9b", "prompt"): "soft prompt alone",
    **dict.fromkeys([("idefics-9b", "ct-kv"), ("qwen3-vl-8b", "ct-kv")], "cannot be put before other prompts"),
}


@pytest.fixture
def request_of(small_world, tmp_path):
    def make(backbone: str, method: str, given: dict, **fields) -> TrialRequest:
        source, manifest = BackboneSource(variant="tiny"), small_world / "mini-vqa" / "manifest.json"
        options = methods.parse(method, given)
        facts = options.facts()
        base = {
            "num_train_samples": 4, "epochs": 2, "learning_rate": facts.learning_rate, "weight_decay": 0.05,
            "warmup_ratio": 0.1, "gradient_clip": 1.0, "micro_batch_size": 2, "accumulation": 2, "engine": "torch",
            "num_selection_samples": 2, "num_shots": 1 if facts.is_shown else 0, "alignment_weight":
            facts.alignment_weight, "ground_truth_weight": facts.ground_truth_weight, "precision": "bf16",
        }  # fmt: skip
        config = TrialConfig(
            backbone=backbone, backbone_digest=backbones.digest_of(backbone, source), task="mini-vqa",
            manifest_digest=Manifest.load(manifest).digest, method=method, options=options.plain(), **(base | fields),
        )  # fmt: skip
        return TrialRequest(config=config, folder=str(tmp_path / config.key), manifest=str(manifest), source=source)

    return make


@pytest.fixture
def gpu(monkeypatch):
    # files are written from memory that this device does not have
    monkeypatch.setattr(TrialRun, "_ended", lambda self, status, error=None: self._report(status))
    monkeypatch.setattr(TrialRun, "_save_checkpoint", lambda self: None)
    with simulated_gpu() as made:
        yield made


@pytest.mark.parametrize("backbone", [name for name in backbones.names() if backbones.get(name).hub_id])
def test_every_backbone_trains_chooses_and_answers_with_every_method(request_of, monkeypatch, backbone):
    """Alone or in packs, as a sweep puts trials together; what is not on the GPU beside what is would be refused."""
    monkeypatch.setattr(
        engine, "save_file", lambda tensors, file: save_file({n: x.cpu() for n, x in tensors.items()}, file)
    )
    short = {"num_train_samples": 2, "epochs": 1, "accumulation": 1, "num_selection_samples": 1}
    packs: dict[str, list[TrialRequest]] = {}
    for method in adapters.names():
        request = request_of(backbone, method, {}, **short, selection_metric="loss")
        packs.setdefault(pack_key(request.config) or request.key, []).append(request)
    with simulated_gpu() as gpu:
        bench = Workbench(device=NAME)
        for requests in packs.values():
            for request in list(requests):
                if (backbone, request.config.method) in REFUSED:
                    with pytest.raises(InputError, match=REFUSED[backbone, request.config.method]):
                        bench.admit(request)
                    requests.remove(request)
                else:
                    assert bench.admit(request) == 0
            ended = []
            while bench.loop.trials:
                ended += bench.advance()
            assert all(report.end == "finished" and report.metrics.train_loss > 0 for report in ended), ended
            gpu.reset()
            evaluation = EvaluationConfig(trial=requests[0].key, num_samples=1, max_new_tokens=2)
            answered = bench.answer(requests, evaluation)
            assert len(ended) == len(answered) == len(requests) and all(len(each.texts) == 1 for each in answered)
            assert sum(gpu.operators.values()) > 100


@pytest.mark.parametrize(("backbone", "trials", "waits", "operators"), STEPS)
def test_a_step_waits_at_most_twice(gpu, request_of, monkeypatch, backbone, trials, waits, operators):
    seen, step = [], TrainingLoop._step

    def counted(self, pack, work):
        gpu.reset()
        step(self, pack, work)
        seen.append((+gpu.waits, sum(gpu.operators.values())))

    monkeypatch.setattr(TrainingLoop, "_step", counted)
    bench = Workbench(device=NAME)
    for method, given in trials:
        bench.admit(request_of(backbone, method, given))
    while bench.loop.trials:
        bench.advance()
    waited, ran = seen[-1]
    assert sum(waited.values()) <= waits, waited
    assert ran <= operators


def test_a_token_waits_once(gpu, request_of, monkeypatch):
    bench = Workbench(device=NAME)
    bench.admit(request_of("idefics2-8b-base", *HIFICL))
    bench.advance()  # selection has computed the visual tokens
    model, passes, counted = bench.loop.resident.loaded.model, [], Counter()

    def count(*_) -> None:
        passes.append(1)
        counted.update(gpu.waits)
        gpu.reset()

    hook = decoder_of(model).decoder.register_forward_hook(count)
    gpu.reset()
    bench.advance()
    hook.remove()
    decoded = {where: count for where, count in counted.items() if count > len(passes) // 2}
    assert len(passes) > 8
    assert sum(decoded.values()) <= len(passes), decoded
    assert all("generation/utils.py" in where for where in decoded)  # transformers asks whether all rows have ended


def test_a_row_that_ends_a_token_late_says_the_same(tiny, monkeypatch):
    from pipeline.evaluate import generate

    class Letters:
        def decode(self, tokens, **_):
            return "".join("ab\n"[int(token)] for token in tokens)

    rows = torch.tensor([[0, 0, 1, 2, 1], [0, 1, 1, 1, 2]])
    late, prompt = generate._StopAt(generate._Stops(Letters(), ("\n",)), 1, lags=True), 1
    prompt_and_more = [rows[:, : prompt + i] for i in range(1, 5)]
    assert [late(ids, None).tolist() for ids in prompt_and_more] == [
        [False, False], [False, False], [False, False], [True, False],
    ]  # fmt: skip
    at_once = generate._StopAt(generate._Stops(Letters(), ("\n",)), 1)
    assert [at_once(ids, None).tolist() for ids in prompt_and_more][2:] == [[True, False], [False, True]]
