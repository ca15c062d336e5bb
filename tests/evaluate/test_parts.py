"""An evaluation in parts, and several adapters in one batch, give what one trial in one piece gives."""

from __future__ import annotations

from pipeline.config.trial import EvaluationConfig
from pipeline.train.workbench import Workbench


def test_parts_are_the_whole_to_the_bit_and_a_pack_answers_as_its_trials_do(trial, tmp_path):
    bench = Workbench(device="cpu", batch_size=2)
    requests = [
        trial(method, tmp_path, epochs=1, learning_rate=rate)
        for method, rate in (("hificl", 0.05), ("mimic", 0.05), ("live", 0.02), ("lora-mini", 0.05))
    ]
    for request in requests:
        bench.admit(request)
        while bench.loop.trials:
            bench.advance()
    evaluation = EvaluationConfig(trial="-", split="selection", max_new_tokens=4)
    whole = []
    for request in requests:
        record = bench.score(request, evaluation)
        parts = [bench.answer([request], evaluation, (i, 3))[0] for i in range(3)]
        assert [len(part.texts) for part in parts] == [2, 2, 2]
        again = bench.finish(request, evaluation, parts)
        assert again.model_copy(update={"seconds": record.seconds}) == record
        whole.append({answer.sample_id: answer.prediction for answer in record.predictions})
    assert any(texts != whole[0] for texts in whole)
    halves = [bench.answer(requests, evaluation, (i, 2)) for i in range(2)]
    assert [{**first.texts, **second.texts} for first, second in zip(*halves, strict=True)] == whole
