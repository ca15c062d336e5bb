"""A backbone with an adapter or behind demonstrations, as lmms-eval and lm-evaluation-harness ask it.

lmms-eval finds `--model hificl` by its entry point (`lmms_eval_models`). lm-evaluation-harness has none for models, so
`python -m pipeline.evaluate.harness` is its own command line with `--model hificl` added. Their classes are made when
they are asked for: neither harness is needed for anything else here.

Demonstrations with pictures come from a file: lmms-eval writes its own few-shot documents into the question as text,
without their pictures. Text alone has nothing to lose, so there `--num_fewshot` shows the task's own.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline import adapters
from pipeline.adapters.base import Adapter
from pipeline.backbones.load import Loaded
from pipeline.backbones.passes import bytes_of_row
from pipeline.baselines.demonstrations import draw_from, fixed
from pipeline.config.schema import TaskFile
from pipeline.core.errors import HificlError, InputError, of_an_extra
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate.answerer import Prompt, adapter_on, load_backbone, project_around
from pipeline.evaluate.generate import generate, longest_first
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import Encoded, encode_all
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks.file_rows import completed
from pipeline.tasks.file_task import FileTask

with of_an_extra():
    from PIL import Image, ImageOps

NAME = "hificl"
_SOURCE = ("revision", "gguf", "chat")  # of a backbone that is named by `hub:` or `folder:`
_MOST_NEW_TOKENS = 1024  # where neither the harness's task nor ours says
_STORED = "RGB"


@dataclass(frozen=True)
class Asked:
    """One question of a harness.

    Attributes:
        number: by which demonstrations are drawn: the document's.
        text: of the question.
        pictures: of the question.
    """

    number: int
    text: str
    pictures: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Writing:
    """How an answer is written: the likeliest one, cut at the first stop."""

    max_new_tokens: int | None = None
    stops: tuple[str, ...] = ()
    num_beams: int = 1

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Writing:
        """Return what a harness's generation settings say.

        Raises:
            InputError: they sample.
        """
        if settings.get("do_sample") and float(settings.get("temperature") or 0) > 0:
            way_out = "Set --gen_kwargs do_sample=false, temperature=0"
            raise InputError("an answer is the likeliest one, not a sample", where="generation_kwargs", way_out=way_out)
        until = settings.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        most = settings.get("max_new_tokens") or settings.get("max_gen_toks")
        return cls(int(most) if most else None, stops, int(settings.get("num_beams") or 1))


class Prompted:
    """A backbone in memory, with what stands around a harness's questions.

    Args:
        backbone: its name, also `hub:` or `folder:`; None: the adapter's.
        adapter: a folder of an adapter, ours or PEFT's LoRA; None: the backbone as it is.
        task: whose wording the prompt has; None: the adapter's own, without one that of vqav2.
        shots: demonstrations in front of each question.
        demonstrations: a file of samples to draw them from, in any form that a task over one's own file has.
        seed: of the draw.
        draw: `per-query`, by the document's number, or `fixed`, the same for all; both as the method `icl-k` does.
        batch_size: prompts at once.
        device: cpu or cuda; None: cuda where there is one.
        dtype: None: the one that the adapter was trained in, or the source's.
        settings: of a backbone that is named by `hub:` or `folder:` (revision, gguf, chat).

    Raises:
        InputError: no such backbone or adapter, an adapter of another one, or too few demonstrations.
    """

    def __init__(
        self, backbone: str | None = None, adapter: str | None = None, *, task: str | None = None, shots: int = 0,
        demonstrations: str | None = None, seed: int = 0, draw: str = "per-query", batch_size: int | str = 1,
        device: str | None = None, dtype: str | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.shots, self.batch_size = _number("shots", shots), _number("batch_size", batch_size)
        if draw not in ("per-query", "fixed"):
            raise InputError(f"is {draw}", where="draw", way_out="Give draw=per-query or draw=fixed")
        self.draw, self.seed = draw, _number("seed", seed)
        self.pool = _samples(demonstrations) if demonstrations else []
        if self.shots and not self.pool:
            way_out = "Give --model_args shots=4,demonstrations=FILE"
            raise InputError("demonstrations have to come from a file", where="demonstrations", way_out=way_out)
        self.loaded, self.adapter, origin = opened(backbone, adapter, device=device, dtype=dtype, **settings)
        self.prompt = Prompt.of(self.loaded.backbone, origin, task)
        self.visual = VisualTokens(self.loaded, None)
        self._pictures = tempfile.TemporaryDirectory(prefix="hificl-pictures-")

    def write(self, asked: Sequence[Asked], writing: Writing) -> list[str]:
        """Return the answers."""
        with self._attached():
            return generate(
                self.loaded, self._encoded(asked), visual_tokens=self.visual, batch_size=self.batch_size,
                max_new_tokens=writing.max_new_tokens or self.prompt.max_new_tokens or _MOST_NEW_TOKENS,
                num_beams=writing.num_beams, stop_strings=(*self.prompt.stops, *writing.stops),
                from_pixels=self._from_pixels,
            )  # fmt: skip

    @torch.no_grad()
    def loglikelihoods(self, asked: Sequence[Asked], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability behind its question, and whether greedy decoding writes it."""
        prompts = self._encoded(asked, continuations)
        order, scored = longest_first(prompts), dict[int, tuple[float, bool]]()
        with self._attached():
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                results = self.loaded.passes.run(
                    "scoring", [prompts[i] for i in chosen], self._scored, width=len, device=self.loaded.device,
                    bytes_of=lambda tokens: tokens * bytes_of_row(self.loaded.model, 1),
                )  # fmt: skip
                scored |= zip(chosen, results, strict=True)
        return [scored[i] for i in range(len(prompts))]

    def _scored(self, prompts: Sequence[Encoded]) -> list[tuple[float, bool]]:
        if self._from_pixels:
            images: dict[str, Any] = {"pixels": self.visual.pixels([row.images for row in prompts])}
        else:
            images = {"visual": self.visual.get([image for row in prompts for image in row.images])}
        batch = collate(prompts, self.loaded, **images).to(self.loaded.device)
        logits = self.loaded.model(**batch.model_inputs(self.loaded)).logits
        scored = []
        for row, prompt in enumerate(prompts):
            start, end = prompt.answer_span or (len(prompt), len(prompt))
            said = logits[row, start - 1 : end - 1].float()  # a token is told by what stands before it
            target = batch.input_ids[row, start:end, None]
            total = said.log_softmax(-1).gather(-1, target).sum()
            said[:, self.loaded.never_generated] = float("-inf")
            scored.append((float(total), bool((said.argmax(-1, keepdim=True) == target).all())))
        return scored

    def _encoded(self, asked: Sequence[Asked], continuations: Sequence[str | None] | None = None) -> list[Encoded]:
        rendered = []
        for each, continuation in zip(asked, continuations or [None] * len(asked), strict=True):
            images = tuple(map(self._kept, each.pictures))
            question = each.text if self.prompt.template.asks else None
            query = Sample("", f"document {each.number}", images, question, target="", references=())
            rendered.append(self.prompt.rendered(query, self._shown(query), continuation))
        return encode_all(self.loaded, rendered)

    def _shown(self, query: Sample) -> list[Sample]:
        if not self.shots:
            return []
        if self.draw == "fixed":
            return fixed(self.pool, [query], self.shots, self.seed)[0]
        return draw_from(self.pool, query, self.shots, self.seed)

    def _kept(self, picture: Image.Image) -> ImageRef:
        """Return a picture as a file, upright, one for all questions about it."""
        content = io.BytesIO()
        ImageOps.exif_transpose(picture).convert(_STORED).save(content, "PNG")
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        file = Path(self._pictures.name) / f"{digest}.png"
        if not file.exists():
            file.write_bytes(content.getvalue())
        return ImageRef(str(file), digest)

    def _attached(self) -> Any:
        return nullcontext() if self.adapter is None else adapters.attach(self.loaded.model, self.adapter)

    @property
    def _from_pixels(self) -> bool:
        return self.adapter is not None and self.adapter.trains_vision


def _number(name: str, value: int | str) -> int:
    if not str(value).isdecimal():
        raise InputError(f"is {value}", where=name, way_out=f"Give a number: {name}=4")
    return int(value)


def opened(
    backbone: str | None, adapter: str | None, *, device: str | None = None, dtype: str | None = None, **settings: Any
) -> tuple[Loaded, Adapter | None, Mapping[str, Any]]:
    """Return a backbone in memory, the adapter read for it, and what the adapter's record says of its making.

    Raises:
        InputError: no such backbone or adapter, or one of another backbone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        way_out = "Start the harness without accelerate or torchrun"
        raise InputError("one process answers all questions", where="WORLD_SIZE", way_out=way_out)
    origin: Mapping[str, Any] = {} if adapter is None else adapters.read_config(Path(adapter)).extra
    name = backbone or origin.get("backbone")
    if not name:
        missing = "the adapter does not name its backbone" if adapter else "no backbone is named"
        raise InputError(missing, where="--model_args", way_out="Give backbone=NAME, also hub:org/name or folder:PATH")
    unknown = [key for key in settings if key not in _SOURCE]
    if unknown:
        way_out = (
            "hificl takes backbone, adapter, task, shots, demonstrations, seed, draw, dtype, revision, gguf and chat"
        )
        raise InputError(f"unknown '{unknown[0]}'", where="--model_args", way_out=way_out)
    name += "".join(f",{key}={str(value).lower() if key == 'chat' else value}" for key, value in settings.items())
    project = project_around(Path(adapter)) if adapter else Path()
    loaded = load_backbone(name, project, {**origin, "precision": dtype} if dtype else origin, device)
    return loaded, None if adapter is None else adapter_on(loaded, Path(adapter), origin), origin


def _samples(file: str) -> list[Sample]:
    """Return the samples of a file; of its training split where it has splits."""
    path = Path(file)
    root = path.resolve().parent
    task = FileTask.of("demonstrations", completed("demonstrations", TaskFile(file=path.name), root))
    split = "train" if "train" in task.pools(root) else task.pools(root)[0]
    list(task.index(root, split))  # every row is looked at before anything is asked
    return [
        replace(sample, images=tuple(ImageRef(str(root / image.path), image.sha256) for image in sample.images))
        for sample in task.read(root, split)
    ]


def lmms_eval_models() -> Any:
    """Return what lmms-eval's entry point asks for; simple models alone are asked for a log-likelihood there."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path=f"{__name__}.LmmsModel")


def _whole(pair: tuple[float, bool]) -> Any:
    """Return a log-likelihood as lmms-eval hands it on: some versions write a pair as text where nothing wraps it."""
    from lmms_eval.api.instance import GenerationResult, unwrap_generation_output

    return pair if unwrap_generation_output(pair)[0] == pair else GenerationResult(pair)


@cache
def _lmms_model() -> type:
    from lmms_eval.api.model import lmms

    class LmmsModel(lmms):  # type: ignore[misc]  # a class of no stubs
        """`lmms-eval --model hificl`; its `--model_args` are those of `Prompted`."""

        def __init__(self, max_batch_size: int | None = None, **arguments: Any) -> None:
            super().__init__()
            del max_batch_size  # a batch that does not fit is halved
            self.prompted = Prompted(**arguments)

        def generate_until(self, requests: list[Any]) -> list[str]:
            texts: dict[int, str] = {}
            for writing, places in _alike(requests, lambda request: Writing.of(request.args[1])).items():
                asked = [self._asked(requests[i].args[0], *requests[i].args[2:]) for i in places]
                texts |= zip(places, self.prompted.write(asked, writing), strict=True)
            return [texts[i] for i in range(len(requests))]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            asked, continuations = [], []
            for request in requests:
                context, target, *rest = request.args
                asked.append(self._asked(context, *rest))
                continuations.append(target if isinstance(target, str) else str(target(self._document(*rest[1:]))))
            scored = self.prompted.loglikelihoods(asked, continuations)
            # of choices, whose targets come as texts, lmms-eval takes the one of the least: it means their losses
            signs = [-1.0 if isinstance(request.args[1], str) else 1.0 for request in requests]
            return [_whole((sign * value, greedy)) for sign, (value, greedy) in zip(signs, scored, strict=True)]

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise InputError("an adapter answers one question", way_out="Leave tasks of several rounds out")

        def _document(self, number: int, task: str, split: str) -> Any:
            return self.task_dict[task][split][number]

        def _asked(self, text: str, pictures_of: Callable[[Any], Any], number: int, task: str, split: str) -> Asked:
            pictures = pictures_of(self._document(number, task, split)) or []
            if not all(isinstance(picture, Image.Image) for picture in pictures):
                raise InputError("its documents hold more than pictures", where=task, way_out="Leave the task out")
            return Asked(number, text, tuple(pictures))

    return LmmsModel


@cache
def _text_model() -> type:
    from lm_eval.models.huggingface import HFLM

    class TextModel(HFLM):  # type: ignore[misc]  # a class of no stubs
        """`--model hificl`: lm-evaluation-harness's own `hf` model over a backbone with an adapter inside.

        Contexts are read as the harness writes them; with `prompt=adapter`, which `--num_fewshot` does not go with,
        they are put into the prompt that the adapter was trained with, and answers end where that says.
        """

        def __init__(
            self, backbone: str | None = None, adapter: str | None = None, prompt: str = "harness",
            device: str | None = None, dtype: str | None = None, batch_size: int | str = 1,
            max_batch_size: int | None = None, **settings: Any,
        ) -> None:  # fmt: skip
            source = {key: settings.pop(key) for key in _SOURCE if key in settings}
            loaded, part, origin = opened(backbone, adapter, device=device, dtype=dtype, **source)
            if prompt not in ("harness", "adapter") or (prompt == "adapter" and part is None):
                way_out = "Give prompt=harness; or prompt=adapter with an adapter"
                raise InputError(f"is {prompt}", where="prompt", way_out=way_out)
            self._prompt = Prompt.of(loaded.backbone, origin, None) if prompt == "adapter" else None
            model = loaded.model if part is None else adapters.wrap(loaded.model, part)
            super().__init__(model, backend="causal", tokenizer=loaded.tokenizer, batch_size=batch_size,
                             max_batch_size=max_batch_size or 64, **settings)  # fmt: skip

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return super().generate_until([self._worded(request) for request in requests], disable_tqdm)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return super().loglikelihood([self._worded(request) for request in requests], disable_tqdm)

        def _worded(self, request: Any) -> Any:
            """Return a request in the adapter's prompt, where that is asked for."""
            if self._prompt is None:
                return request
            context, rest = request.args[0], request.args[1]
            query = Sample("", 0, (), context, target="", references=())
            if isinstance(rest, Mapping):
                rest = {**rest, "until": [*self._prompt.stops, *Writing.of(rest).stops]}
            return replace(request, arguments=(self._prompt.rendered(query, ()).text, rest))

    return TextModel


def _alike(requests: Sequence[Any], what: Callable[[Any], Any]) -> dict[Any, list[int]]:
    """Return the places of requests that share something, in order."""
    places: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(what(request), []).append(place)
    return places


_MADE: Mapping[str, Callable[[], type]] = {"LmmsModel": _lmms_model, "TextModel": _text_model}


def __getattr__(name: str) -> type:  # the classes derive from those of the harnesses
    if name not in _MADE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _MADE[name]()


def main() -> None:
    """Run lm-evaluation-harness's command line, with `--model hificl`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    importlib.import_module("lm_eval.models")  # or the harness would not look for its own
    model_registry.register(NAME, target=f"{__package__}.harness:TextModel")
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except HificlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
