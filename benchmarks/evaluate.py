"""What scoring and generation take: `hificl bench evaluate`."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image

from benchmarks.support.timing import Findings, Rounds, alternate, main, one_thread, report
from pipeline import adapters, backbones, tasks
from pipeline.backbones.load import Loaded
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate import generate as generation
from pipeline.evaluate.generate import generate
from pipeline.prompts.prompt import Encoded, encode_all, render
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.scores.caption import caption_scores
from pipeline.scores.chair import chair_scores, ground_truth
from pipeline.scores.vqa import vqa_accuracy

_ANSWERS = ("yes", "no", "2", "dark blue", "a red bus", "Skateboarding!", "it's wooden", "café", "3,000", "none")
_WORD_TEXT = (
    "a man woman dog cat bus truck bench horse giraffe umbrella pizza laptop on in with near the red large two "
    "standing street table grass riding holding young wooden next to clock toilet traffic light sitting people group"
)
_WORDS = _WORD_TEXT.split()
_OBJECTS = ("person", "dog", "cat", "bus", "truck", "bench", "horse", "giraffe", "umbrella", "pizza", "laptop", "clock")


@dataclass(frozen=True)
class Sizes:
    """How much is scored and generated."""

    answers: int = 10_000
    captions: int = 40_504
    references: int = 5
    prompts: int = 48
    batch_size: int = 16
    new_tokens: int = 8
    split: int = 512
    split_batch_size: int = 128
    split_new_tokens: int = 3
    repeats: int = 3
    score_repeats: int = 1
    backbone: str = "mini-idefics2"


def run(device: str = "cpu", *, sizes: Sizes | None = None) -> dict[str, Any]:
    """Time the scores of whole evaluation splits, and generation in batches against one prompt after another.

    Answers, captions and references are made up in the official shape: ten answers a question, five reference captions
    an image of eight to thirteen words. `cider_seconds` starts Java's tokenizer for captions and references;
    `cider_again_seconds` is the next epoch's score, new captions against references whose tokens are remembered.
    `chair_seconds` is with the objects at hand, `chair_truth_seconds` finds them in the references. Generation is a
    random miniature with a HiFICL adapter attached, visual tokens at hand; every answer has the same number of tokens.
    `head` ratios answer a split in its batches: what all prompts begin with (`instruction`, the adapter attached;
    `demonstrations`, eight, nothing attached) is computed once, over in every prompt (`whole`) or, for demonstrations,
    over a copy of it in every row (`copied`). Generation runs on one thread of a CPU.

    Args:
        device: cpu or cuda; scoring runs on the CPU.
        sizes: how much; None: the official splits' sizes.
    """
    sizes = sizes or Sizes()
    findings = Findings()
    for label, work, repeats in _scores(sizes):
        rounds = alternate({label: work}, repeats, warmup=0)
        findings.seconds(label, rounds, label)
    with one_thread(device):
        _generation(findings, sizes, device)
    return report(findings, device=device, method=run.__doc__, sizes=asdict(sizes))


def _scores(sizes: Sizes) -> list[tuple[str, Callable[[], Any], int]]:
    draw = random.Random(0)
    questions = range(sizes.answers)
    truth = {q: [_answer(draw) for _ in range(10)] for q in questions}
    answers = {q: _answer(draw) for q in questions}
    images = range(sizes.captions)
    references = {i: [_caption(draw) for _ in range(sizes.references)] for i in images}
    captions, later = ({i: _caption(draw) for i in images} for _ in range(2))
    objects = {i: set(draw.sample(_OBJECTS, 3)) for i in images}
    return [
        (f"vqa_seconds_{sizes.answers}", lambda: vqa_accuracy(answers, truth), sizes.score_repeats),
        # each once: the references' tokens are remembered within the process
        (f"cider_seconds_{sizes.captions}", lambda: caption_scores(captions, references, ("CIDEr",)), 1),
        (f"cider_again_seconds_{sizes.captions}", lambda: caption_scores(later, references, ("CIDEr",)), 1),
        (f"chair_seconds_{sizes.captions}", lambda: chair_scores(captions, objects), sizes.score_repeats),
        (f"chair_truth_seconds_{sizes.captions}", lambda: ground_truth(objects, references), 1),
    ]


def _answer(draw: random.Random) -> str:
    # half of the answers stand once: what is remembered of an answer helps with the rest alone
    return draw.choice(_ANSWERS) + (f" {draw.randrange(10**6):,}" if draw.random() < 0.5 else "")


def _caption(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(8, 13))).capitalize() + "."


def _generation(findings: Findings, sizes: Sizes, device: str) -> None:
    loaded = backbones.load(sizes.backbone, variant="tiny", device=device)
    loaded.model.generation_config.eos_token_id = None  # every answer as long as it may be
    adapter = adapters.create("hificl", loaded.model)
    with tempfile.TemporaryDirectory(prefix="hificl-bench-") as folder:
        root = Path(folder)
        requests = _requests(loaded, root, sizes.prompts)
        visual = VisualTokens(loaded)
        visual.prefetch([image for request in requests for image in request.images], root)

        def write(batch_size: int) -> None:
            with adapters.attach(loaded.model, adapter):
                generate(
                    loaded, requests, max_new_tokens=sizes.new_tokens, visual_tokens=visual, root=root,
                    batch_size=batch_size, stop_strings=(),
                )  # fmt: skip

        callables = {"batched": lambda: write(sizes.batch_size), "single": lambda: write(1)}
        rounds = alternate(callables, sizes.repeats, device=device)
        _heads(findings, loaded, adapter, root, sizes, device)
    findings.add("batched_over_single_seconds", rounds, "batched", "single")
    for name in callables:
        rates = Rounds({name: [sizes.prompts / seconds for seconds in rounds.seconds[name]]})
        findings.seconds(f"{name}_samples_a_second", rates, name)


def _heads(findings: Findings, loaded: Loaded, adapter: Any, root: Path, sizes: Sizes, device: str) -> None:
    def answered(requests: Sequence[Encoded]) -> None:
        generate(
            loaded, requests, max_new_tokens=sizes.split_new_tokens, visual_tokens=visual, root=root,
            batch_size=sizes.split_batch_size, stop_strings=(),
        )  # fmt: skip

    whole = patch.object(generation, "common_head", lambda *_: None)
    copied = patch.object(generation, "can_stand_beside", lambda _: False)
    for name, shots, others in (
        ("instruction", 0, {"whole": whole}), ("demonstrations", 8, {"whole": whole, "copied": copied}),
    ):  # fmt: skip
        requests = _requests(loaded, root, sizes.split, shots)
        visual = VisualTokens(loaded)
        visual.prefetch([image for request in requests for image in request.images], root)
        ways = {"once": nullcontext(), **others}
        with adapters.attach(loaded.model, adapter) if not shots else nullcontext():

            def one(way: Any, requests: Sequence[Encoded] = requests) -> None:
                with way:
                    answered(requests)

            rounds = alternate({way: partial(one, ways[way]) for way in ways}, sizes.repeats, device=device)
        for way in others:
            findings.add(f"head_{name}_once_over_{way}_seconds", rounds, "once", way)
        rates = Rounds({"once": [sizes.split / seconds for seconds in rounds.seconds["once"]]})
        findings.seconds(f"head_{name}_samples_a_second", rates, "once")


def _requests(loaded: Loaded, root: Path, count: int, shots: int = 0) -> list[Encoded]:
    task = tasks.get("mini-vqa")
    samples = []
    for number in range(count + shots):
        path = root / f"{number}.png"
        Image.new("RGB", (32, 32), (number * 5 % 256, 90, 160)).save(path)
        question = "what is it" + " made of" * (number % 4)  # prompts of several lengths, as a real split has them
        samples.append(Sample(task.name, number, (ImageRef(path.name),), question, "wood", ("wood",)))
    shown, asked = samples[:shots], samples[shots:]
    rendered = [render(task.template, loaded.backbone, sample, shown) for sample in asked]
    return encode_all(loaded, rendered, root=root)


if __name__ == "__main__":
    main(run)
