"""What a backbone is: facts (`Backbone`) and the way its architecture is built, fed and read (`Family`)."""

from __future__ import annotations

import copy
import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.config.schema import BackboneSource
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import Json
from pipeline.core.registry import Registry

if TYPE_CHECKING:
    from PIL import Image
    from transformers.utils import ModelOutput

# Facts from the published checkpoints use these names for the processor's pixel path. PIL is named explicitly: the
# torchvision processors resize with other rounding, and the papers' numbers were made with PIL.
IMAGE_BACKEND = "pil"

_OF_TEXT = ("unk", "bos", "eos", "pad", "turn")  # roles of special tokens that stand in text; the others, for images

Pixels = dict[str, Tensor]  # what one image (or a row of images) looks like to the vision tower
# Arguments of a model by name: tensors, and what its vision tower would have given; None takes one away.
ModelArguments = dict[str, "Tensor | dict[str, ModelOutput] | None"]


def placed(x: Tensor, device: torch.device | str) -> Tensor:
    """Return what the host has made, on `device`, without waiting for it: by way of memory that a GPU reads itself."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def import_deepspeed() -> Any:
    """Return DeepSpeed, imported when it is first needed."""
    without_mlflow = {"deepspeed", "mlflow"}.isdisjoint(sys.modules)
    if without_mlflow:  # its autotuner takes MLflow along where that is there: two seconds of a worker's start
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if without_mlflow:
            del sys.modules["mlflow"]

    # An all-reduce in C++ for several ranks on one CPU, compiled when first used: minutes, and a compiler to have.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def gathered(*modules: nn.Module, inside: bool = True) -> AbstractContextManager[None]:
    """Return a context in which the modules' parameters are whole, where ranks have them in parts (ZeRO-3).

    Every rank enters it. Elsewhere nothing happens.

    Args:
        modules: some.
        inside: those of the modules inside them too.
    """
    parts = [p for module in modules for p in module.parameters(recurse=inside) if hasattr(p, "ds_id")]
    if not parts:
        return nullcontext()
    return import_deepspeed().zero.GatheredParameters(parts)


def num_values(parameter: Tensor) -> int:
    """Return how many values a parameter has on all ranks together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@dataclass(frozen=True, slots=True)
class ChatMarkers:
    """The text that a chat model wants around a user's and an assistant's turn.

    A turn pair reads `user_open` {question} `user_close` `assistant_open` {cue} {answer} `terminator` `after`.

    Attributes:
        terminator: the token the model ends its answer with; it is learnt, and generation stops at it.
        after: what separates two turn pairs.
        head: what stands once in front: a start token, a system's turn.
        answer_open: what opens the turn that is answered, where it is not `assistant_open` (a thought left empty).
        images_first: whether a turn's images stand in front of its text, whatever the wording says.
        images_close: what then separates them from the text.
    """

    user_open: str
    user_close: str
    assistant_open: str
    terminator: str
    after: str
    head: str = ""
    answer_open: str | None = None
    images_first: bool = False
    images_close: str = ""


@dataclass(frozen=True, slots=True)
class RoleLines:
    """How MimIC's code writes a prompt for a backbone: a piece of text for every role, one after the other.

    Attributes:
        instruction: with {text}; once, at the very beginning.
        image: with {image}.
        question: with {text}.
        cue: with {role} (`Answer` or `Caption`, or in small letters {small_role}); what an open query ends with.
        answer: with {answer}; closes a demonstration, and is the span that is trained.
        after: what separates a demonstration from what follows.
        stop: where an answer ends, beside the task's stop words.
    """

    instruction: str
    image: str
    question: str
    cue: str
    answer: str
    after: str = ""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Modules:
    """Dotted names of what an image goes through inside the transformers model."""

    vision: str
    connector: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Backbone:
    """One backbone as facts.

    Attributes:
        name: how params.yaml and the command line call it.
        family: how its architecture is built, fed and read.
        hub_id: the published checkpoint, None for a miniature.
        stands_for: the published backbone whose role a miniature plays.
        config: the real configuration, as keyword arguments of `family.config_class`.
        processor: settings of the image processor and the processor, real sizes.
        special_tokens: text of the special tokens by role (bos, eos, pad, unk, image, ...).
        parameters: number of parameters of the real configuration, as published or counted.
        tiny: what `variant: tiny` changes in `config`, by the same nesting.
        tiny_processor: what it changes in `processor`.
        chat: None for a base model that is prompted with plain text.
        published_roles: how MimIC's code prompts it (`subsample.prompt: published`); None where that code does not
            know it.
        placeholder: the text of one image in an unexpanded prompt; None: the image token alone.
        added_tokens: what its tokenizer reads as one token wherever it stands, the special tokens among it; known once
            it is loaded.
    """

    name: str
    family: Family
    hub_id: str | None
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    parameters: int
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tiny_processor: Mapping[str, Any] = field(default_factory=dict)
    stands_for: str | None = None
    chat: ChatMarkers | None = None
    published_roles: RoleLines | None = None
    placeholder: str | None = None
    added_tokens: tuple[str, ...] = ()

    def config_for(self, variant: str) -> Json:
        """Return the configuration of a variant ('published' and 'meta': the real one; 'tiny')."""
        return merged(self.config, self.tiny) if variant == "tiny" else copy.deepcopy(dict(self.config))

    def processor_for(self, variant: str) -> Json:
        """Return the processor's settings of a variant."""
        return merged(self.processor, self.tiny_processor) if variant == "tiny" else copy.deepcopy(dict(self.processor))

    @property
    def modules(self) -> Modules:
        """Where vision tower and connector live."""
        return self.family.modules

    @property
    def never_generated(self) -> tuple[str, ...]:
        """Roles of the special tokens that stand for images and are kept out of generated text."""
        return tuple(role for role in self.special_tokens if role not in _OF_TEXT)

    @property
    def reserved(self) -> frozenset[str]:
        """What text of the data must not hold, because it would be read as something else than text."""
        return frozenset(self.special_tokens.values()) | frozenset(self.added_tokens)

    @property
    def image_token(self) -> str:
        """The text of the token that stands for an image or a part of it."""
        return self.special_tokens["image"]

    @property
    def image_text(self) -> str:
        """What a prompt holds where an image belongs, before it is expanded; nothing in a text decoder's."""
        return self.placeholder or self.special_tokens.get("image", "")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Json:
    """Return `base` with `changes` laid over it; nested mappings are merged, everything else is replaced."""
    out: Json = copy.deepcopy(dict(base))
    for key, value in changes.items():
        below = out.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and key != "size":
            out[key] = merged(below, value)
        else:
            out[key] = copy.deepcopy(value)
    return out


@dataclass(frozen=True, slots=True)
class SizeRule:
    """What a published processor asks of a picture's size.

    Attributes:
        says: the rule, as a sentence.
        holds: whether a picture of some height and width keeps it.
    """

    says: str
    holds: Callable[[int, int], bool]


class Family(ABC):
    """How the checkpoints of one transformers architecture are built, fed and read.

    Shape letters: B rows of a batch, I images of a row, N images of a batch, T visual tokens of an image, D decoder
    width.
    """

    model_type: str
    # Whether the number of an image's tokens depends on its size; `expand` then needs the sizes.
    sized: bool = False
    # Whether a token's states follow from the tokens that it sees and its position alone, so that what several prompts
    # begin with is computed once: generation can go on from its keys and values, training can share it.
    shares_prefix: bool = True
    # Whether the vision tower sees one row of [rows, tokens, width] a picture, so that adapters of it pack.
    row_a_picture: bool = True
    size_rules: ClassVar[tuple[SizeRule, ...]] = ()  # most processors take pictures of any size
    # Which configuration keys hold the ids of which special tokens.
    token_keys: ClassVar[Mapping[str, str]] = {"image_token_id": "image"}

    modules: Modules

    # Of a backbone whose facts are in its files alone (`families.generic`): where they are; its one file of weights.
    by_name: ClassVar[bool] = False
    folder: str | None = None
    revision: str | None = None
    gguf: str | None = None
    prompting: str = ""  # what decides how it is prompted, beside its files

    # Names in transformers, imported when they are first needed.
    architecture: ClassVar[str]  # what the names of its classes begin with
    image_processor_name: ClassVar[str]  # the class on PIL
    video_processor_name: ClassVar[str | None] = None  # where the processor class insists on one; torchvision only

    @property
    def reads_images(self) -> bool:
        """Whether it has a vision tower."""
        return True

    @property
    def model_name(self) -> str:
        """Name of the transformers model class."""
        return f"{self.architecture}ForConditionalGeneration"

    @property
    def config_class(self) -> Any:
        """The transformers configuration class."""
        return from_transformers(f"{self.architecture}Config")

    @property
    def model_class(self) -> Any:
        """The transformers model class."""
        return from_transformers(self.model_name)

    @property
    def processor_class(self) -> Any:
        """The transformers processor class."""
        return from_transformers(f"{self.architecture}Processor")

    @property
    def image_processor_class(self) -> Any:
        """The transformers image processor class on PIL."""
        return from_transformers(self.image_processor_name)

    def config_in(self, folder: Path) -> Any:
        """Return the configuration of a folder in the hub's layout; None where the backbone's own facts are that.

        Raises:
            InputError: it cannot be read, or its class cannot be adapted.
        """
        del folder
        return None

    def known(self, backbone: Backbone, model: Any, processor: Any = None) -> Backbone:
        """Return the backbone's facts with what its model and processor add to them.

        Raises:
            InputError: they do not fit what is done here.
        """
        del model, processor
        return backbone

    @staticmethod
    @abstractmethod
    def train_tokenizer(lines: Sequence[str], special: Mapping[str, str]) -> Any:
        """Return a small tokenizer of the real class, trained on `lines` (variant tiny)."""

    def build_config(self, settings: Mapping[str, Any]) -> Any:
        """Return the transformers configuration."""
        return self.config_class(**copy.deepcopy(dict(settings)))

    def fit_vocabulary(self, settings: Mapping[str, Any], tokenizer: Any, special: Mapping[str, str]) -> Json:
        """Return `settings` with vocabulary size and token ids of a small tokenizer (variant tiny)."""
        ids = {role: tokenizer.convert_tokens_to_ids(text) for role, text in special.items()}
        text = {
            "vocab_size": vocabulary_size(tokenizer),
            "bos_token_id": ids.get("bos", ids["pad"]),
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["pad"],
        }
        return merged(settings, {"text_config": text, **{key: ids[role] for key, role in self.token_keys.items()}})

    def build_processor(self, tokenizer: Any, settings: Mapping[str, Any]) -> Any:
        """Return the real processor class around `tokenizer` with an image processor on PIL."""
        parts = [self.image_processor_class(**settings["image_processor"]), tokenizer]
        if self.video_processor_name is not None:
            parts.append(from_transformers(self.video_processor_name)())
        return self.processor_class(*parts, **{key: settings[key] for key in settings if key != "image_processor"})

    def load_processor(self, folder: Path, settings: Mapping[str, Any]) -> Any:
        """Return the processor of a published layout; its image processor is the PIL class, whatever is installed."""
        processor = self.processor_class.from_pretrained(folder, local_files_only=True)
        processor.image_processor = self.image_processor_class.from_pretrained(folder, local_files_only=True)
        return processor

    def load_model(self, folder: Path, **settings: Any) -> Any:
        """Return the model of a published layout, with transformers' report of what it found there."""
        return self.model_class.from_pretrained(folder, use_safetensors=True, local_files_only=True, **settings)

    @abstractmethod
    def expand(self, text: str, processor: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> str:
        """Return `text` with every image written out as `processor` would.

        Args:
            text: a prompt with one image text for each image, or its beginning.
            processor: the processor in use.
            image_sizes: (height, width) of each image; read only where the number of tokens depends on it.
        """

    def tokenise(self, tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Return token ids and character offsets of expanded texts, special tokens of the start included."""
        out = tokenizer(list(texts), return_offsets_mapping=True, return_attention_mask=False)
        return out["input_ids"], out["offset_mapping"]

    def check_size(self, height: int, width: int, where: str) -> None:
        """Check that the published processor takes a picture of this size.

        Raises:
            InputError: it does not; `where` is what the message calls the picture.
        """
        for rule in self.size_rules:
            if not rule.holds(height, width):
                raise InputError(
                    f"{width} x {height} pixels: {rule.says}", where=where,
                    way_out="Take it out of the data, or use another backbone",
                )  # fmt: skip

    @abstractmethod
    def process(self, processor: Any, image: Image.Image) -> Pixels:
        """Return one image as the vision tower sees it, without batch dimensions."""

    @abstractmethod
    def stack(self, rows: Sequence[Sequence[Pixels]]) -> Pixels:
        """Return the model's pixel arguments for a batch of rows of images."""

    def encode_images(self, model: Any, images: Sequence[Pixels]) -> list[Tensor]:
        """Return the visual tokens [T, D] of images whose pixels have one and the same shape."""
        features = model.get_image_features(**self.stack([[image] for image in images]), return_dict=True)
        return [tokens.reshape(-1, tokens.shape[-1]) for tokens in features.pooler_output]

    def image_arguments(
        self,
        *,
        visual: Sequence[Tensor] | None,
        pixels: Mapping[str, Tensor] | None,
        input_ids: Tensor,
        image_counts: Sequence[int],
        image_token_id: int,
    ) -> ModelArguments:
        """Return the model's arguments that carry the images of a batch.

        Args:
            visual: visual tokens [T, D] of all images in row order, as `encode_images` makes them; or None.
            pixels: what `stack` makes; or None. With neither, the text is fed alone.
            input_ids: [B, S] the batch's tokens.
            image_counts: images of each row.
            image_token_id: the token that stands for an image.

        Returns:
            Arguments; one that is None takes the batch's own argument of that name away.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if visual is not None:
            _check_takes_visual_tokens()
            features: Any = list(visual)  # fresh for each call: `generate` changes it
            return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}
        return dict(pixels) if pixels is not None else {}


@functools.cache
def _check_takes_visual_tokens() -> None:
    """Refuse a transformers whose models would drop visual tokens without a word.

    Raises:
        InputError: it knows no `mm_encoder_outputs`.
    """
    import transformers
    from transformers.generation import utils

    if not hasattr(utils.GenerationMixin, "_supports_mm_encoder_outputs"):
        problem = f"its models take no visual tokens that were computed before (version {transformers.__version__})"
        raise InputError(problem, where="transformers", way_out="Install the version that requirements.txt names")


def from_transformers(name: str) -> Any:
    """Return what transformers calls `name`, imported when it is first needed."""
    import transformers

    return getattr(transformers, name)


def vocabulary_size(tokenizer: Any) -> int:
    """Return the size of an embedding that has a row for every token of `tokenizer`.

    Idefics2's processor adds a token past the embedding (`<end_of_utterance>`); it gets no row, as in the published
    base checkpoint.
    """
    return len(tokenizer.get_vocab().keys() - {"<end_of_utterance>"})


def replace_in_order(text: str, token: str, counts: Sequence[int]) -> str:
    """Return `text` with the i-th `token` written `counts[i]` times; counts beyond the text's tokens are not used.

    Raises:
        ValueError: there are more tokens than counts.
    """
    parts = text.split(token)
    if len(parts) - 1 > len(counts):
        raise ValueError(f"{len(parts) - 1} images in the text, but the sizes of {len(counts)}")
    return parts[0] + "".join(token * count + part for count, part in zip(counts, parts[1:], strict=False))


REGISTRY: Registry[Backbone] = Registry("backbone", __package__, "hificl.backbones")


def get(name: str) -> Backbone:
    """Return a backbone by its file's name, by the name that params.yaml declares, or by `hub:...` and `folder:...`.

    Raises:
        InputError: no such backbone.
    """
    source = BackboneSource.spelled(name)
    return REGISTRY.get(name) if source is None else REGISTRY.made(name, source)
