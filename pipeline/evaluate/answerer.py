"""An adapter with its backbone, loaded once, that answers for any image: `hificl predict` and the logged models."""

from __future__ import annotations

import base64
import errno
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline import adapters, backbones
from pipeline.adapters.attach import MAX_NEW_TOKENS
from pipeline.adapters.base import Adapter
from pipeline.backbones.base import Backbone, Family
from pipeline.backbones.load import Loaded
from pipeline.config.load import PARAMS, BackboneSource, load
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import Json
from pipeline.data import image_files
from pipeline.data.image_files import decode_image, os_problem, read_image_bytes, size_of, upright
from pipeline.data.sample import ImageRef, PromptStyle, Sample
from pipeline.evaluate.generate import generate
from pipeline.prompts.prompt import Encoded, Rendered, encode_all, neutral, render, stop_strings
from pipeline.records.store import check_adapter
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks import PromptTemplate, Task, tasks

_INLINE = "the image in base64"
_SHOWN = 80  # characters of what is neither
_PROMPT = "vqav2"  # whose wording a backbone without an adapter reads
_WAY_OUT = "Give an image's path, or its content in base64"


@dataclass(frozen=True)
class Prompt:
    """How a question is worded, and where its answer ends; `max_new_tokens` None: its author did not say."""

    template: PromptTemplate
    backbone: Backbone
    style: PromptStyle
    stops: tuple[str, ...]
    max_new_tokens: int | None

    @classmethod
    def of(cls, backbone: Backbone, origin: Mapping[str, Any], task: str | None) -> Prompt:
        """Return an adapter's own prompt; that of `task` where it is given or the adapter has none."""
        style, known = origin.get("prompt", "papers"), _task_of(origin, task)
        if known is None and "template" in origin:
            return cls._said(backbone, origin["template"])
        known = known or tasks.get(_PROMPT)
        stops = stop_strings(known.template, backbone, style)
        return cls(known.template, backbone, style, stops, known.max_new_tokens)

    @classmethod
    def _said(cls, backbone: Backbone, template: Mapping[str, Any]) -> Prompt:
        """Return the prompt that `wrap` was given: a demonstration is that text, an answer and the first stop."""
        text, stops = str(template["text"]), tuple(template["stop"])
        query = text.replace("{", "{{").replace("}", "}}").replace("{{question}}", "{question}")
        backbone = replace(backbone, chat=None, published_roles=None)  # the text is whole as it is
        if backbone.image_text:
            shown = backbone.image_text if backbone.image_text in query else backbone.image_token
            query = query.replace(shown, "{image}")
            backbone = replace(backbone, placeholder=shown)
        written = PromptTemplate("", False, query, " {answer}" + (stops or ("\n",))[0], ())
        return cls(written, backbone, "papers", stops, None)

    def rendered(self, query: Sample, shown: Sequence[Sample], continuation: str | None = None) -> Rendered:
        """Return the text of a question behind demonstrations; `continuation` is its answer's span, as it is."""
        open_prompt = render(self.template, self.backbone, query, shown, style=self.style)
        if continuation is None:
            return open_prompt
        answer = neutral(continuation, self.backbone)
        start = len(open_prompt.text)
        return replace(open_prompt, text=open_prompt.text + answer, answer_span=(start, start + len(answer)))


def _task_of(origin: Mapping[str, Any], task: str | None) -> Task | None:
    """Return the task of a name, or else the one that an adapter's record names; None: neither says one."""
    name, definition = origin.get("task") or "", origin.get("definition")
    if name and definition:
        made = tasks.made(name, definition)
        if task in (None, name):
            return made
        if task in made.of_name:
            return made.of_name[task]
    return tasks.get(task or name) if task or name else None


class Answerer:
    """Answers for images with a trial's adapter attached; weights are loaded at the first answer.

    They are loaded in the precision that the trial was scored in, and in as many bits; an older adapter, which does not
    name it, has the source's `dtype`.

    Args:
        folder: an adapter's folder: of a trial (`runs/KEY/adapter`), or of a wrapped model with its prompt.
        project: the folder whose params.yaml says where the weights lie.
        task_name: whose prompt is used; None: the adapter's own.
        reads_files: whether an image may be a file's path. Not where others ask, who may have it read any file.
        backbone: what it was trained on, where the folder does not say.

    Raises:
        InputError: no adapter, one that is damaged or names neither task nor prompt, or no such task.
    """

    def __init__(
        self, folder: Path, *, project: Path = Path(), task_name: str | None = None, reads_files: bool = True,
        backbone: str | None = None,
    ) -> None:  # fmt: skip
        check_adapter(folder)  # before the backbone is loaded
        self.folder, self.project, self.reads_files = folder, project, reads_files
        self.config = adapters.read_config(folder)
        self._wording: Prompt | None = None
        self.origin: Mapping[str, Any] = {**({"backbone": backbone} if backbone else {}), **self.config.extra}
        if not isinstance(self.origin.get("backbone"), str):
            way_out = "Give --backbone: a name, hub:org/name or folder:PATH"
            raise InputError("the adapter does not name its backbone", where=str(folder), way_out=way_out)
        self.task = _task_of(self.origin, task_name)
        if self.task is None and "template" not in self.origin:
            way_out = "Give --task, or the adapter folder of a trial: runs/KEY/adapter"
            raise InputError("the adapter names neither its task nor a prompt", where=str(folder), way_out=way_out)

    def answer(self, image: str | Path | None, question: str | None = None, max_new_tokens: int | None = None) -> Json:
        """Return what the backbone says to an image.

        Args:
            image: a file's path (or `shard.parquet#ROW/COLUMN`), or its content in base64 (a data URI too). EXIF
                orientation is applied. None: of a task whose prompt has none.
            question: for tasks that ask one.
            max_new_tokens: None: the task's own.

        Returns:
            `answer` (`text` is the same), `question`, `method`, `options`, `backbone`, `task`,
            `trial`.

        Raises:
            InputError: no such image, a question too many or too few, or weights that are missing or not those that
                the adapter was trained on.
        """
        with self.asked(image, question) as sample:
            loaded, adapter = self._loaded
            most, stops = max_new_tokens or self.max_new_tokens, self.stops(loaded)
            text = self.said(loaded, adapter, self.prompt(loaded, sample), most, stops)
        return {
            "answer": text, "text": text, "question": question,
            "method": self.config.method, "options": self.config.options, "backbone": self.origin["backbone"],
            "task": self.task.name if self.task else None, "trial": self.origin.get("trial"),
        }  # fmt: skip

    @property
    def max_new_tokens(self) -> int:
        """How long an answer may be that nobody limits."""
        return self.task.max_new_tokens if self.task else MAX_NEW_TOKENS

    @contextmanager
    def asked(self, image: str | Path | None, question: str | None, loaded: Loaded | None = None) -> Iterator[Sample]:
        """Give what is asked, checked, its image in a file for as long as the block lasts.

        Args:
            image: as for `answer`.
            question: likewise.
            loaded: the backbone, where it is in memory.

        Raises:
            InputError: no such image, or one too many or too few of either.
        """
        template = self.task.template if self.task else self._prompt(loaded or self._loaded[0]).template
        asker, name = (f"task {self.task.name}", self.task.name) if self.task else ("the adapter's own prompt", "")
        _check_question(template, question, asker)
        if (image is None) == ("{image}" in template.query):
            needs = "needs an image" if image is None else "has no image in its prompt"
            way_out = "Give --image" if image is None else "Leave --image out"
            raise InputError(f"{asker} {needs}", where="--image", way_out=way_out)
        if image is None:
            yield Sample(name, 0, (), question, target="", references=())
            return
        with _as_file(image, reads_files=self.reads_files) as file:
            given = not self.reads_files or str(image).startswith("data:") or file != Path(image)
            self._family.check_size(*image_files.sizes([file])[0], "the image given" if given else str(image))
            yield Sample(name, 0, (ImageRef(str(file.resolve())),), question, target="", references=())

    def prompt(self, loaded: Loaded, sample: Sample) -> Encoded:
        """Return what the backbone reads."""
        return encode_all(loaded, [self._prompt(loaded).rendered(sample, ())], root="")[0]

    def stops(self, loaded: Loaded) -> tuple[str, ...]:
        """Return where an answer is cut."""
        return self._prompt(loaded).stops

    def _prompt(self, loaded: Loaded) -> Prompt:
        if self._wording is None:  # once, not for every question; an adapter has one backbone
            self._wording = Prompt.of(loaded.backbone, self.origin, self.task.name if self.task else None)
        return self._wording

    @staticmethod
    def said(loaded: Loaded, adapter: Adapter, prompt: Encoded, max_new_tokens: int, stops: tuple[str, ...]) -> str:
        """Return the answer to a prompt, generated alone."""
        with adapters.attach(loaded.model, adapter):
            (text,) = generate(
                loaded, [prompt], max_new_tokens=max_new_tokens, visual_tokens=VisualTokens(loaded, None),
                stop_strings=stops, from_pixels=adapter.trains_vision,
            )  # fmt: skip
        return text

    def adapter_on(self, loaded: Loaded) -> Adapter:
        """Return the adapter, read for a backbone in memory.

        Raises:
            InputError: its weights are not those that the adapter was trained on.
        """
        return adapter_on(loaded, self.folder, self.origin)

    @cached_property
    def _family(self) -> Family:
        name = str(self.origin["backbone"])
        return backbones.of(name, source_of(name, self.project)).family

    @cached_property
    def _loaded(self) -> tuple[Loaded, Adapter]:
        name = str(self.origin["backbone"])
        loaded = load_backbone(name, self.project, self.origin)
        return loaded, self.adapter_on(loaded)


def _check_question(template: PromptTemplate, question: str | None, asker: str) -> None:
    if template.asks and not (question or "").strip():
        raise InputError(f"{asker} needs a question", where="--question", way_out="Give --question")
    if not template.asks and question is not None:
        raise InputError(f"{asker} has no question", where="--question", way_out="Leave --question out")


@contextmanager
def _as_file(image: str | Path, *, reads_files: bool = True) -> Iterator[Path]:
    """Give a whole, upright picture as a file: where it is, or written out for as long as it is needed."""
    name, data = _given(str(image), reads_files)
    turned = upright(data, name)
    if turned is None:
        decode_image(data, name)
        if name != _INLINE:
            yield Path(name)
            return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image"
        file.write_bytes(turned or data)
        yield file


def _given(text: str, reads_files: bool) -> tuple[str, bytes]:
    """Return what messages call a picture, and its bytes: from where the text says, or from the text itself."""
    problem = "neither a file nor an image in base64" if reads_files else "not an image in base64"
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    inline = not reads_files or text.startswith("data:")
    if not inline:
        try:
            return text, read_image_bytes(text)
        except (FileNotFoundError, NotADirectoryError) as error:
            problem = os_problem(error)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise InputError(os_problem(error), where=shown, way_out=_WAY_OUT) from error
        except ValueError:
            pass  # a NUL, which no path has
    with suppress(ValueError, InputError):
        data = base64.b64decode("".join(text.rpartition("base64,")[2].split()), validate=True)
        if not inline:
            size_of(data, _INLINE)  # a file's name may happen to be base64
        return _INLINE, data
    raise InputError(problem, where=shown, way_out=_WAY_OUT if reads_files else "Give its content in base64")


def project_around(folder: Path) -> Path:
    """Return the folder of the params.yaml that a trial's adapter lies below; the current one where there is none."""
    return next((parent for parent in folder.resolve().parents if (parent / PARAMS).is_file()), Path())


def source_of(name: str, project: Path) -> BackboneSource:
    """Return where the weights lie: the project's params.yaml says it, where there is one."""
    params = project / PARAMS
    source = (
        load(params).backbone_source(name) if params.is_file() else BackboneSource.spelled(name) or BackboneSource()
    )
    return source.model_copy(update={"weights": str(project / source.weights)}) if source.weights else source


def adapter_on(loaded: Loaded, folder: Path, origin: Mapping[str, Any]) -> Adapter:
    """Return the adapter in a folder, read for a backbone in memory.

    Raises:
        InputError: the backbone's weights are not those that it was trained on.
    """
    wanted = origin.get("backbone_digest", loaded.digest)
    if loaded.digest != wanted:
        raise InputError(
            f"these weights (digest {loaded.digest[:12]}) are not those of the training ({wanted[:12]})",
            where=f"backbones.{origin.get('backbone', loaded.backbone.name)}",
            way_out="Put the old weights back",
        )
    return adapters.load(folder, loaded.model)


def load_backbone(name: str, project: Path, origin: Mapping[str, Any], device: str | None = None) -> Loaded:
    """Return a backbone as it answers: from where the project's params.yaml says.

    Args:
        name: which.
        project: the folder of params.yaml.
        origin: what an adapter's record says of its making: `precision` (without it: the source's `dtype`), `quantize`.
        device: None: a GPU where there is one.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the same sums as in the trial
    source, device = source_of(name, project), device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype, quantized = origin.get("precision", source.dtype), origin.get("quantize", "none")
    return backbones.load_from(name, source, dtype=dtype, device=device, quantized=quantized)
