"""Any vision-language model or text decoder of transformers that passed the battery, by name or folder.

It is fed as its own processor feeds it: the chat template says what stands around a turn, the processor what stands for
an image, and `mm_encoder_outputs` carries what the vision tower made. Which classes passed, and why others do not, is
in `architectures.json`; the battery (`tests/backbones/test_battery.py`) holds the file to it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline.backbones.base import (
    IMAGE_BACKEND,
    REGISTRY,
    Backbone,
    ChatMarkers,
    Family,
    ModelArguments,
    Modules,
    Pixels,
    from_transformers,
    gathered,
    num_values,
)
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.weights import find_folder
from pipeline.core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.config.load import BackboneSource

ARCHITECTURES = Path(__file__).with_name("architectures.json")
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "text_replacement_offsets"}
_OF_TOWER = {"last_hidden_state", "pooler_output", "hidden_states", "attentions", "deepstack_features"}
_PROBE = (64, 96)  # height and width of the blank picture that shows what the vision tower gives


@dataclass(frozen=True, slots=True)
class Architecture:
    """One class of transformers as the battery found it.

    Attributes:
        model_type: as config.json has it.
        model_class: of transformers.
        reads: pictures and text, or text alone.
        status: whether it passed.
        why: what it was tested for, or in what it fails.
        needs: a package that its processor asks for.
    """

    model_type: str
    model_class: str
    reads: Literal["images", "text"]
    status: Literal["tested", "refused"]
    why: str
    needs: str = ""


@cache
def architectures() -> dict[str, Architecture]:
    """Return every class that is known, by its `model_type`."""
    rows = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
    return {row["model_type"]: Architecture(**row) for row in rows}


def declared(name: str, source: BackboneSource) -> Backbone:
    """Return what is known of a backbone before its folder is read."""
    family = GenericFamily(source)
    return Backbone(name, family, None if family.folder else source.hub, {}, {}, {}, parameters=0)


class GenericFamily(Family):
    """How one backbone of any tested class is built, fed and read; `at` and `known` fill in what its files say.

    Every picture is processed alone, so that it looks the same behind demonstrations and without.
    """

    by_name = True
    sized = True
    shares_prefix = False
    modules = Modules(vision="", connector=())

    def __init__(self, source: BackboneSource) -> None:
        self.source = source
        self.revision, self.gguf, self.prompting = source.revision, source.gguf, f"chat={source.chat}\n"
        hub = str(source.hub)
        local = hub.startswith((".", "/", "~")) or hub.count("/") != 1 or Path(hub).is_dir()
        self.folder = hub if local else None  # one that was named in place of a repository of the hub
        self.architecture_row: Architecture | None = None
        self.model_type = ""
        self._accepts: frozenset[str] = frozenset()  # arguments of the model's forward
        self._image_ids: tuple[int, ...] = ()  # tokens that a model with kinds of tokens takes for an image's
        self._merge = 1  # patches a side that become one visual token, where the model places them in a grid
        self._features: Any = None  # what the vision tower gave for the blank picture
        self._written: dict[tuple[int, int], str] = {}  # an image as text, by its size

    @property
    @override
    def reads_images(self) -> bool:
        """Whether it has a vision tower."""
        return self.architecture_row is not None and self.architecture_row.reads == "images"

    @property
    def row_a_picture(self) -> bool:  # type: ignore[override]
        """True of a text decoder; how others are fed is known once they are loaded."""
        try:
            folder = find_folder(declared("", self.source), self.source.weights, self.revision)
            row = architectures().get(_config(folder, self.gguf).model_type)
        except (InputError, OSError, ValueError, KeyError, ImportError):  # which is said where it is read
            return False
        return row is not None and row.reads == "text"

    @property
    @override
    def model_name(self) -> str:
        return self.architecture_row.model_class if self.architecture_row else "found in its config.json"

    @property
    @override
    def config_class(self) -> Any:
        return from_transformers("AutoConfig")

    @property
    @override
    def model_class(self) -> Any:
        return from_transformers(self.model_name)

    @staticmethod
    @override
    def train_tokenizer(lines: Sequence[str], special: Mapping[str, str]) -> Any:
        raise InputError("a backbone of the hub has no tiny variant", way_out="Make a small folder in its layout")

    # ------------------------------------------------------------------------------------------------ its files

    @property
    def files(self) -> dict[str, Any]:
        """Arguments of transformers' loaders."""
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"local_files_only": True, "trust_remote_code": False, **gguf}

    @override
    def config_in(self, folder: Path) -> Any:
        if self.gguf is None and not (folder / "config.json").is_file():
            files = sorted(path.name for path in folder.glob("*.gguf"))
            way_out = f"Add gguf={files[0]}" if files else "Give a folder in the hub's layout"
            raise InputError("config.json is missing", where=str(folder), way_out=way_out)
        if self.gguf is not None and not (folder / self.gguf).is_file():
            raise InputError(
                "no such file", where=str(folder / self.gguf), way_out="Give the file's name in its folder"
            )
        self._tested(self._named_in(folder), folder)
        try:
            config = _config(folder, self.gguf)
        except (OSError, ValueError, KeyError, ImportError) as error:
            way_out = "Install it: pip install gguf" if isinstance(error, ImportError) else "Use a model that it knows"
            problem = f"transformers cannot read its configuration: {' '.join(str(error).split())[:200]}"
            raise InputError(problem, where=str(folder), way_out=way_out) from error
        row = self._tested(config.model_type, folder)
        if row is None:
            raise _refused(config.model_type, "it has not passed the battery", folder)
        if row.needs and find_spec(row.needs) is None:
            problem = f"the processor of {row.model_class} needs the package {row.needs}, which is not installed"
            raise InputError(problem, where=str(folder), way_out=f"Install it: pip install {row.needs}")
        self.architecture_row, self.model_type = row, config.model_type
        return config

    @staticmethod
    def _tested(model_type: str | None, folder: Path) -> Architecture | None:
        """Return what is known of a class, if it is; one that is refused is so before anything more is read."""
        row = architectures().get(model_type or "")
        if row is not None and row.status == "refused":
            raise _refused(row.model_class, row.why, folder)
        return row

    def _named_in(self, folder: Path) -> str | None:
        """Return the `model_type` of config.json, none of whose own code is run."""
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) if self.gguf is None else {}
        except (OSError, ValueError) as error:
            raise InputError(f"no valid JSON ({error})", where=str(folder / "config.json")) from error
        if not isinstance(settings, dict):
            raise InputError("is no JSON object", where=str(folder / "config.json"), way_out="Get the file again")
        if "auto_map" in settings and settings.get("model_type") not in architectures():
            raise InputError(
                "it needs code of its own (auto_map), which is not run", where=str(folder / "config.json"),
                way_out="Use a checkpoint whose class transformers has",
            )  # fmt: skip
        return str(settings.get("model_type", ""))

    @override
    def load_processor(self, folder: Path, settings: Mapping[str, Any]) -> Any:
        if not self.reads_images:
            return from_transformers("AutoTokenizer").from_pretrained(folder, **self.files)
        processor = from_transformers("AutoProcessor").from_pretrained(folder, **self.files)
        images = from_transformers("AutoImageProcessor")
        processor.image_processor = images.from_pretrained(folder, backend=IMAGE_BACKEND, **self.files)
        return processor

    @override
    def load_model(self, folder: Path, **settings: Any) -> Any:
        if self.gguf is None:
            return super().load_model(folder, **settings)
        return from_transformers("AutoModelForCausalLM").from_pretrained(folder, gguf_file=self.gguf, **settings)

    @override
    def known(self, backbone: Backbone, model: Any, processor: Any = None) -> Backbone:
        spec = decoder_of(model)
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        parameters = sum(map(num_values, model.parameters()))
        if self.reads_images:
            self._find_vision(model, spec.decoder)
        if processor is None:
            return replace(backbone, parameters=parameters)
        tokenizer = getattr(processor, "tokenizer", processor)
        if not tokenizer.is_fast:
            raise InputError("its tokenizer tells no offsets", where=backbone.name, way_out="Add a tokenizer.json")
        ends = {"eos": tokenizer.eos_token, "pad": tokenizer.pad_token or tokenizer.eos_token}
        special = {role: text for role, text in {"bos": tokenizer.bos_token, **ends}.items() if text}
        placeholder = None
        if self.reads_images:
            special |= self._look(model, processor, tokenizer)
            placeholder = processor.image_token
        else:
            kinds = getattr(spec.text_config, "layer_types", None)  # Mistral says no kinds, and a window for all
            whole = set(kinds) == {"full_attention"} if kinds else not getattr(spec.text_config, "sliding_window", None)
            self.shares_prefix = whole and spec.num_attentions == spec.num_layers
        chat = None
        if self.source.chat and (
            getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        ):
            chat, placeholder = _turns(processor, tokenizer, placeholder, backbone.name)
        return replace(
            backbone, parameters=parameters, special_tokens=special, chat=chat, placeholder=placeholder,
        )  # fmt: skip

    def _find_vision(self, model: Any, decoder: Any) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        inside, vision = names[id(decoder)], names.get(id(model.get_encoder(modality="image")), "")
        inner = getattr(model, "model", model)  # Llama 4 has none
        parts = [names[id(child)] for child in inner.children()]
        beside = [name for name in parts if not inside.startswith(name) and not vision.startswith(name)]
        self.modules = Modules(vision, tuple(beside))

    def _look(self, model: Any, processor: Any, tokenizer: Any) -> dict[str, str]:
        """Show the tower a blank picture; return the special tokens that stand for images."""
        from PIL import Image

        self._image_ids = tuple(token for token in processor.image_token_ids if token is not None)
        merge = getattr(processor.image_processor, "merge_size", None)
        merge = merge or getattr(model.config.vision_config, "spatial_merge_size", None)
        self._merge = int(merge or 1)
        blank = Image.new("RGB", _PROBE[::-1], (128, 128, 128))
        pixels, text = self._one(processor, blank)
        like = next(model.parameters())
        on = {k: v.to(like.device, like.dtype if v.is_floating_point() else None) for k, v in pixels.items()}
        parts = [model.get_submodule(name) for name in (self.modules.vision, *self.modules.connector)]
        with torch.no_grad(), gathered(*parts), gathered(model, getattr(model, "model", model), inside=False):
            self._features = self._encoded(model, on)
        config = model.config
        number = getattr(config, "image_token_id", None)
        number = getattr(config, "image_token_index", None) if number is None else number
        if number is None:
            number = self._image_ids[0]
        shown = {token for token in tokenizer.get_added_vocab() if token in text or token in processor.image_token}
        shown |= {token for token in processor.all_special_multimodal_tokens if token}
        image = tokenizer.convert_ids_to_tokens(number)
        return {"image": image, **{f"image_{i}": token for i, token in enumerate(sorted(shown - {image}))}}

    # ---------------------------------------------------------------------------------------------------- feeding it

    @override
    def expand(self, text: str, processor: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> str:
        if not image_sizes:
            return text
        written = [self._as_text(processor, size) for size in image_sizes]
        return processor.get_text_with_replacements([text], written)[0][0]

    def _as_text(self, processor: Any, size: tuple[int, int]) -> str:
        if size not in self._written:
            from PIL import Image

            self._written[size] = self._one(processor, Image.new("RGB", size[::-1]))[1]
        return self._written[size]

    def _one(self, processor: Any, image: Image) -> tuple[Pixels, str]:
        """Return one picture as the model's arguments, and as text."""
        out = processor(
            text=[processor.image_token], images=[[image]], return_tensors="pt", return_text_replacement_offsets=True
        )
        pixels = {name: torch.as_tensor(value) for name, value in out.items() if name in self._accepts - _TEXT}
        return pixels, out["text_replacement_offsets"][0][0]["replacement"]

    @override
    def tokenise(self, tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        start = tokenizer.bos_token  # a chat template writes it as text
        out = tokenizer(
            list(texts), return_offsets_mapping=True, return_attention_mask=False,
            add_special_tokens=not (start and texts[0].startswith(start)),
        )  # fmt: skip
        return out["input_ids"], out["offset_mapping"]

    @override
    def process(self, processor: Any, image: Image) -> Pixels:
        if not self.reads_images:
            raise InputError(f"{self.model_name} reads no pictures", way_out="Use data without images")
        return self._one(processor, image)[0]

    @override
    def stack(self, rows: Sequence[Sequence[Pixels]]) -> Pixels:
        images = [image for row in rows for image in row]
        return {name: _joined([image[name] for image in images]) for name in (images[0] if images else ())}

    @override
    def encode_images(self, model: Any, images: Sequence[Pixels]) -> list[Tensor]:
        told = [
            {name: part.tolist() for name, part in image.items() if not part.is_floating_point()} for image in images
        ]
        if any(shape != told[0] for shape in told):  # padded to one size, but of different numbers of tokens
            return [tokens for image in images for tokens in self.encode_images(model, [image])]
        stacked = self.stack([images])
        features = self._encoded(model, stacked)
        levels = [features[self._field], *(features.get("deepstack_features") or ())]
        tokens = torch.cat([_flat(level) for level in levels], -1).unflatten(0, (len(images), -1))
        if "image_grid_thw" not in stacked:
            return list(tokens)
        grid = (stacked["image_grid_thw"][:, 1:] // self._merge).tolist()  # where M-RoPE places them
        return [image.unflatten(0, tuple(sides)) for image, sides in zip(tokens, grid, strict=True)]

    @property
    def _field(self) -> str:
        """What of the tower's output the decoder reads; Llama 4 projects it later."""
        return "last_hidden_state" if self._features.get("pooler_output") is None else "pooler_output"

    def _encoded(self, model: Any, pixels: Pixels) -> Any:
        encode = getattr(model, "get_image_features", None) or model.model.get_image_features
        wanted = inspect.signature(encode).parameters
        whole = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
        given = {
            name: value for name, value in pixels.items() if name in wanted or (whole and name != "image_grid_thw")
        }
        return encode(**given, return_dict=True)

    @override
    def image_arguments(
        self, *, visual: Sequence[Tensor] | None, pixels: Mapping[str, Tensor] | None, input_ids: Tensor,
        image_counts: Sequence[int], image_token_id: int,
    ) -> ModelArguments:  # fmt: skip
        out: ModelArguments = {}
        seen = torch.isin(input_ids, torch.tensor(self._image_ids, device=input_ids.device)).int()
        if "token_type_ids" in self._accepts and self.reads_images:
            out["token_type_ids"] = seen
        if not visual and not pixels:
            return out
        if "mm_token_type_ids" in self._accepts:
            out["mm_token_type_ids"] = seen
        if "image_grid_thw" in self._accepts and "mm_token_type_ids" in self._accepts:
            out["position_ids"] = None  # the model numbers them itself, in three dimensions
        if not visual:
            return {**out, **(pixels or {})}
        if "image_grid_thw" in self._accepts:
            grid = [[1, image.shape[0] * self._merge, image.shape[1] * self._merge] for image in visual]
            out["image_grid_thw"] = torch.tensor(grid, device=input_ids.device)
        out["mm_encoder_outputs"] = {"image": self._again(visual)}
        return out

    def _again(self, visual: Sequence[Tensor]) -> Any:
        """Return kept visual tokens in the form in which the tower gave the blank picture's."""
        deep = self._features.get("deepstack_features") or ()
        levels = [image.flatten(0, -2).chunk(1 + len(deep), -1) for image in visual]
        # what more a class gives is the same for every image
        fields = {name: value for name, value in self._features.items() if name not in _OF_TOWER}
        fields |= {self._field: _like(self._features[self._field], [parts[0] for parts in levels])}
        if deep:
            maps = [_like(level, [parts[i + 1] for parts in levels]) for i, level in enumerate(deep)]
            fields["deepstack_features"] = maps
        return type(self._features)(**fields)


def _refused(name: str, why: str, folder: Path) -> InputError:
    way_out = "`hificl backbones` lists the classes that can"
    return InputError(f"{name} cannot be adapted: {why}", where=str(folder), way_out=way_out)


@lru_cache(maxsize=8)
def _config(folder: Path, gguf: str | None) -> Any:
    """Read a configuration; from GGUF it takes seconds."""
    settings = {} if gguf is None else {"gguf_file": gguf}
    return from_transformers("AutoConfig").from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **settings
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the images' tensors one behind the other; smaller ones are filled up with zeros at their ends."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [
            value for size, most in zip(part.shape[:0:-1], largest[::-1], strict=True) for value in (0, most - size)
        ]
        padded.append(nn.functional.pad(part, missing) if any(missing) else part)
    return torch.cat(padded)


def _flat(features: Any) -> Tensor:
    """Return all visual tokens one behind the other, [T, D]."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([_flat(part) for part in features])


def _like(shown: Any, images: Sequence[Tensor]) -> Any:
    """Return the images' tokens as the tower gives them: a list, or one tensor with as many dimensions as `shown`."""
    if not isinstance(shown, Tensor):
        return list(images)  # fresh for each call: `generate` changes it
    joined = torch.cat(list(images))
    if shown.dim() == 2:
        return joined
    per = shown.shape[-2]
    return joined.view(-1, per, joined.shape[-1]) if len(joined) % per == 0 else joined[None]


# ------------------------------------------------------------------------------------------------- the chat template

_ASKED, _SAID, _MORE = "QQuestionQ", "AAnswerA", "MMoreM"


def _turns(processor: Any, tokenizer: Any, image_token: str | None, name: str) -> tuple[ChatMarkers, str | None]:
    """Read off a chat template what stands around turns and images.

    A conversation of marks is written; what lies between them is the template's. Thinking is left out
    (`enable_thinking`), and what a template then puts in front of an answer is kept as `answer_open`.

    Raises:
        InputError: the template cannot be read so.
    """
    source = processor if getattr(processor, "chat_template", None) else tokenizer

    def write(*turns: Sequence[str | None], answered: bool = False) -> str:
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": _content(turn, parts=image_token is not None)}
            for i, turn in enumerate(turns)
        ]
        text: str = source.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered, enable_thinking=False
        )
        return text

    try:
        opened, between, behind, tail = _between(write([_ASKED], [_SAID], [_MORE]), _ASKED, _SAID, _MORE)
        terminator = next(
            (t for t in sorted(tokenizer.get_added_vocab(), key=len, reverse=True) if behind.startswith(t)), ""
        )
        behind = behind.removeprefix(terminator)
        user_open = _common_suffix(opened, behind)
        user_close = commonprefix([between, tail])
        chat = ChatMarkers(
            user_open=user_open, user_close=user_close, assistant_open=between.removeprefix(user_close),
            terminator=terminator or tokenizer.eos_token, after=behind.removesuffix(user_open),
            head=opened.removesuffix(user_open),
            answer_open=None if tail == between else tail.removeprefix(user_close),
        )  # fmt: skip
        if image_token is None:
            return chat, None
        return _with_images(chat, opened, write)
    except Exception as error:  # a template is a program of its own
        raise InputError(
            f"its chat template does not write one turn after the other ({type(error).__name__}: {error})",
            where=f"backbones.{name}", way_out="Set chat: false to prompt it with plain text",
        ) from error  # fmt: skip


def _with_images(chat: ChatMarkers, opened: str, write: Callable[..., str]) -> tuple[ChatMarkers, str]:
    """Add how the template writes images: where they stand in the text, or in front of it."""
    first, second = write([_ASKED, None, _MORE]), write([_ASKED, None, None, _MORE])
    lifted = _between(first, _ASKED)[0] != opened
    if lifted:
        blocks = [_between(text, _ASKED)[0].removeprefix(opened) for text in (first, second)]
    else:
        blocks = [_between(text, _ASKED, _MORE)[1] for text in (first, second)]
    image = blocks[1][: len(blocks[1]) - len(blocks[0])]
    close = blocks[0].removeprefix(image)
    if not image or blocks[1] != image * 2 + close or blocks[0] != image + close or (close and not lifted):
        raise ValueError(f"two images are not twice one: {blocks}")
    return replace(chat, images_first=lifted, images_close=close), image


def _content(turn: Sequence[str | None], *, parts: bool) -> Any:
    if not parts:
        return "".join(text or "" for text in turn)
    return [{"type": "image"} if text is None else {"type": "text", "text": text} for text in turn]


def _between(text: str, *marks: str) -> list[str]:
    out = []
    for mark in marks:
        before, met, text = text.partition(mark)
        if not met:
            raise ValueError("what is said is not in it, or in another order")
        out.append(before)
    return [*out, text]


def _common_suffix(a: str, b: str) -> str:
    return commonprefix([a[::-1], b[::-1]])[::-1]


REGISTRY.build = lambda name, source: declared(name, cast("BackboneSource", source))
