"""Many adapters in one batch against one adapter at the same batch: `hificl bench serve`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.support.shapes import WORKLOADS, Bench, Workload
from benchmarks.support.timing import Findings, Rounds, alternate, main, one_thread, report
from pipeline import adapters, backbones
from pipeline.backbones.load import Loaded
from pipeline.evaluate.continuous import Engine, Member, Question
from pipeline.prompts.prompt import Encoded


@dataclass(frozen=True)
class Sizes:
    """How much is in flight."""

    rows: int = 32
    prompt: int = 90  # tokens: an Idefics2 picture and a question
    new_tokens: int = 32
    repeats: int = 7
    mixed: tuple[str, ...] = ("hificl", "mimic", "live", "lora-mini")


def run(device: str = "cpu", *, sizes: Sizes | None = None, workload: Workload | None = None) -> dict[str, Any]:
    """Time what `hificl serve` does for a full batch: prompts read, then a token of every row at a time.

    `mixed_adapters_over_one` is a batch whose every row has a HiFICL adapter of its own over the same batch of one
    HiFICL adapter; `mixed_methods_over_one` has the methods of `mixed` in turn, each row its own adapter; `mixed_lora`
    is LoRA in the decoder over one such LoRA. Random weights, no pictures; on a CPU one thread, by its own seconds
    on the processor: what else the machine does is no part of them.

    Args:
        device: cpu or cuda.
        sizes: how much; None: 32 rows.
        workload: whose decoder; None: the device's Idefics2.
    """
    sizes, workload = sizes or Sizes(), workload or WORKLOADS[device]["idefics2"]
    findings = Findings()
    with one_thread(device):
        loaded = backbones.load(workload.backbone, variant="tiny", device=device)
        loaded.model = Bench(workload, device).model
        with torch.no_grad():
            loaded.model.get_output_embeddings().weight[loaded.eos_token_ids] = 0  # every answer as long as it may be
        kinds = {"hificl": ["hificl"], "lora": ["lora"], "methods": list(sizes.mixed)}
        members = {name: _members(loaded, methods, sizes.rows) for name, methods in kinds.items()}
        for label, mixed, one in (
            ("mixed_adapters_over_one", "hificl", "hificl"), ("mixed_methods_over_one", "methods", "hificl"),
            ("mixed_lora_over_one", "lora", "lora"),
        ):  # fmt: skip
            engines = {"mixed": _engine(loaded, members[mixed]), "one": _engine(loaded, members[one][:1])}
            work = {name: _Batch(engine, sizes) for name, engine in engines.items()}
            clock = time.thread_time if device == "cpu" else time.perf_counter
            rounds = alternate(work, sizes.repeats, device=device, clock=clock)
            findings.add(label, rounds, "mixed", "one")
            for name in work:
                tokens = sizes.rows * sizes.new_tokens
                a_token = Rounds({name: [1000 * seconds / tokens for seconds in rounds.seconds[name]]})
                findings.seconds(f"{label.removesuffix('_over_one')}_ms_a_token_{name}", a_token, name)
    return report(findings, device=device, method=run.__doc__, sizes={**asdict(sizes), "workload": asdict(workload)})


def _members(loaded: Loaded, methods: Sequence[str], number: int) -> list[Member]:
    return [
        Member(_adapter(loaded, methods[seed % len(methods)], seed), lambda *_: "")  # nobody is asked alone
        for seed in range(number)
    ]


def _adapter(loaded: Loaded, method: str, seed: int) -> adapters.Adapter:
    options = {"scope": "decoder"} if method == "lora" else {}
    adapter, generator = (
        adapters.create(method, loaded.model, seed=seed, **options),
        torch.Generator().manual_seed(seed),
    )
    for parameter in adapter.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return adapter


def _engine(loaded: Loaded, members: list[Member]) -> Engine:
    engine = Engine(loaded, most_rows=1000, unsure=-1.0)
    engine.members += members  # before it starts
    return engine


class _Batch:
    """Asks and answers a full batch."""

    def __init__(self, engine: Engine, sizes: Sizes) -> None:
        self.engine, self.sizes = engine, sizes
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(10, 700, (sizes.rows, sizes.prompt), generator=generator).tolist()

    def __call__(self) -> None:
        written: list[int] = []
        for i, ids in enumerate(self.ids):
            prompt = Encoded(tuple(ids), (), 0, None, i)
            member = self.engine.members[i % len(self.engine.members)]
            heard = lambda _, end: written.append(end.tokens) if end else None  # noqa: E731
            self.engine.ask(Question(member, prompt, self.sizes.new_tokens, (), heard))
        self.engine.answer_all()
        if written != [self.sizes.new_tokens] * self.sizes.rows:
            raise RuntimeError(f"not a full batch: {written}")


if __name__ == "__main__":
    main(run)
