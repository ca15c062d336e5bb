"""`Adapter`: what every trained method is, and the registry that its file enters.

A method edits the decoder in one or more of three places, and says so by the class it derives from:
`AttentionAdapter` (virtual tokens beside the context), `HiddenAdapter` (a state of every layer: what FFN or
self-attention gives, or the residual stream) or `WeightsAdapter` (projections computed otherwise: low-rank updates, or
any of PEFT's layers). Parameters are fp32, stacked over layers.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypedDict

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.adapters.options import Facts
from pipeline.adapters.options import Options as AnyOptions
from pipeline.backbones.decoder import DecoderSpec
from pipeline.core.errors import InputError, WorkError
from pipeline.core.plain_yaml import Json
from pipeline.core.registry import Registry

METHODS: Registry[type[Adapter]] = Registry("method", __package__, "hificl.methods")
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
RECORD_FILE = "hificl.json"  # what CONFIG_FILE holds elsewhere, where that is PEFT's own


_CARD = Path(__file__).with_name("card.md")
_PEFT = """With PEFT alone:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{repository}")
```"""
_EXPORTED = """Without hificl-lab, once it is exported (as a prefix of PEFT's, or as a module by itself):

```bash
hificl export --adapter FOLDER --to module --out OUT
```"""


@dataclass(frozen=True)
class Score:
    """What an adapter of these settings scored, over seeds.

    Attributes:
        values: one a seed, the adapter's own among them.
    """

    task: str
    metric: str
    unit: str
    values: tuple[float, ...]

    def line(self) -> str:
        """Return it with its spread: the standard deviation over seeds, where there are several."""
        mean = sum(self.values) / len(self.values)
        shown = f"{mean:.4g}"
        if len(self.values) > 1:
            spread = (sum((value - mean) ** 2 for value in self.values) / (len(self.values) - 1)) ** 0.5
            shown += f" ± {spread:.2g}"
        return f"| {self.task} | {self.metric} ({self.unit}) | {shown} | {len(self.values)} |"


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        method: its name.
        about: of the method: what it computes, with equation and source.
        options: of the method.
        base: the backbone, by its name on the hub where it has one; `revision` of it.
        facts: what it was made from, by name: digests, settings of the training, the code.
        scores: of its settings.
        peft: whether PEFT opens it.
    """

    method: str
    about: str
    options: Json
    base: str
    revision: str | None = None
    facts: Json = field(default_factory=dict)
    scores: Sequence[Score] = ()
    peft: bool = False

    def text(self, repository: str) -> str:
        """Return the card of a repository."""
        title, _, equation = self.about.partition("\n")
        head = {
            "base_model": self.base, "library_name": "peft" if self.peft else "transformers",
            "tags": ["hificl-lab", self.method, *(["lora"] if self.peft else [])],
        }  # fmt: skip
        rows = [score.line() for score in self.scores]
        table = ["| task | score | value | seeds |", "|---|---|---|---|", *rows]
        facts = {"backbone": self.base, "revision": self.revision or "not pinned", **self.facts}
        return _CARD.read_text(encoding="utf-8").format(
            head="".join(f"{name}: {json.dumps(value)}\n" for name, value in head.items()),
            repository=repository, title=title.rstrip("."), base=self.base, method=self.method,
            equation="\n".join(line.strip() for line in f"{title}\n{equation}".splitlines()).strip(),
            options="\n".join(f"| {name} | {_cell(value)} |" for name, value in self.options.items()),
            facts="\n".join(f"- {name}: {_cell(value)}" for name, value in facts.items()),
            scores="\n".join(table) if rows else "Not scored.",
            elsewhere=(_PEFT if self.peft else _EXPORTED).format(repository=repository),
        )  # fmt: skip


def _cell(value: object) -> str:
    return (value if isinstance(value, str) else json.dumps(value)).replace("|", "\\|").replace("\n", " ")


def push(folder: Path, repository: str, card: Card, *, hub: Path | None = None, private: bool = True) -> str:
    """Put an adapter's folder and its card on the hub.

    Args:
        folder: what `save_pretrained` wrote; it is left as it is.
        repository: `organisation/name`.
        card: what the card says.
        hub: a folder that stands for the hub: the repository becomes a folder in it. None: the hub.
        private: whether a repository that is made is seen by its owner alone.

    Returns:
        Where it lies.

    Raises:
        InputError: no name of a repository, or one that is taken in `hub`.
        WorkError: the hub refuses, or is not reached.
    """
    if repository.count("/") != 1 or not all(part.strip(".- ") for part in repository.split("/")):
        raise InputError(f"'{repository}' names no repository", where="--to", way_out="Write organisation/name")
    with tempfile.TemporaryDirectory() as made:
        staged = Path(made) / "adapter"
        shutil.copytree(folder, staged)
        (staged / "README.md").write_text(card.text(repository), encoding="utf-8")
        if hub is not None:
            place = hub / repository
            if place.exists():
                raise InputError("the repository is there already", where=str(place), way_out="Give another name")
            shutil.copytree(staged, place)
            return str(place)
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=staged, commit_message=f"Add {card.method}"))
        except Exception as error:  # of the hub, of the way there, of what a card may hold
            problem = f"not pushed: {' '.join(str(error).split())[:300]}"
            raise WorkError(problem, where=repository, way_out="Log in with `hf auth login`") from error


@dataclass(frozen=True)
class BackboneIdentity:
    """What of a backbone an adapter is made for; it fits no other."""

    model_type: str
    num_layers: int
    num_heads: int
    head_dim: int
    hidden_size: int

    @classmethod
    def of(cls, spec: DecoderSpec) -> BackboneIdentity:
        """Read the identity off a decoder."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(cls)})

    def check(self, spec: DecoderSpec, where: str) -> None:
        """Refuse a decoder that is not this one, by the first value that differs.

        Raises:
            InputError: the model has another type or another shape.
        """
        present = asdict(BackboneIdentity.of(spec))
        for name, wanted in asdict(self).items():
            if present[name] != wanted:
                raise InputError(
                    f"the adapter was made for a backbone with {name} {wanted}, this model has {present[name]}",
                    where=where,
                    way_out="Use the backbone that the adapter was trained on",
                )


@dataclass(frozen=True)
class AdapterConfig:
    """What a saved adapter is, and `extra`, what its trial noted beside it; PEFT's own names no backbone."""

    method: str
    options: Json
    backbone: BackboneIdentity | None
    extra: Json


class ParameterGroup(TypedDict):
    """Parameters with a learning rate and a weight decay of their own, as AdamW takes them."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float


class Init:
    """Deterministic initial values: one CPU generator, so that device and global random state do not matter."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def normal(self, *shape: int, std: float) -> nn.Parameter:
        """Return a parameter drawn from N(0, std^2)."""
        return self.place(lambda: torch.randn(shape, generator=self.generator) * std, shape)

    def full(self, *shape: int, value: float = 0.0) -> nn.Parameter:
        """Return a constant parameter."""
        return self.place(lambda: torch.full(shape, value), shape)

    def place(self, make: Any, shape: Sequence[int]) -> nn.Parameter:
        """Return `make()` on the device; on the meta device nothing is drawn."""
        if self.device.type == "meta":
            return nn.Parameter(torch.empty(tuple(shape), device="meta"))
        return nn.Parameter(make().to(self.device))


class Shown(Protocol):
    """What the frozen backbone makes of a trial's demonstrations, k samples of its training split."""

    def states(self, state: Literal["mlp", "residual", "attention"]) -> Tensor:
        """Return a state of every layer at each demonstration's last token, where it stands alone, [L, k, D]."""

    def cache(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [L, H_kv, n, d] of all of them in one prompt, which ends right before position 0."""


class Adapter(nn.Module):
    """A trained method: parameters, options, and the backbone that it fits.

    Args:
        options: the method's own, validated.
        spec: the decoder that it is made for.
        init: source of initial values.
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type[AnyOptions]] = AnyOptions
    undecayed: ClassVar[tuple[str, ...]] = ()  # parameters without weight decay: biases, scalars

    def __init__(self, options: AnyOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__()
        self.options, self.backbone = options, BackboneIdentity.of(spec)
        self.extra: Json = {}  # what is saved beside the configuration, whoever saves it

    @classmethod
    def build(cls, model: nn.Module, spec: DecoderSpec, options: Any, seed: int, device: torch.device) -> Adapter:
        """Make the adapter for `model`; methods that look beyond the decoder override this."""
        return cls(options, spec, Init(seed, device))

    @property
    def facts(self) -> Facts:
        """How the method is trained with its options."""
        return self.options.facts()

    @property
    def trains_vision(self) -> bool:
        """Whether gradients reach the vision tower."""
        return self.facts.trains_vision

    @property
    def packable(self) -> bool:
        """Whether several such adapters can share one forward pass."""
        return self.facts.packable

    @property
    def parts(self) -> list[Adapter]:
        """The adapters that a combined method consists of; else the adapter itself."""
        return [self]

    def start(self, shown: Shown) -> None:
        """Take from demonstrations what the method starts from; asked once, before the first step (`Facts.starts`)."""

    def expect(self, tokens: int) -> None:
        """Take the shapes, not the values, that demonstrations of so many tokens will give: to count what it costs."""

    def num_trainable(self) -> int:
        """Return the number of trainable values."""
        return sum(p.numel() for p in self.parameters())

    def modules_trainable(self) -> dict[str, int]:
        """Return the number of trainable values by parameter group of the equations."""
        return {name: p.numel() for name, p in self.named_parameters()}

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[ParameterGroup]:
        """Return AdamW groups; biases and scalars are not decayed.

        Args:
            learning_rate: peak rate of the schedule.
            weight_decay: of the decayed ones.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            decay = 0.0 if name in self.undecayed else weight_decay
            groups.setdefault((self.learning_rate_of(name, learning_rate), decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def learning_rate_of(self, parameter: str, learning_rate: float) -> float:
        """Return one parameter's learning rate, given the trial's."""
        return learning_rate

    def save_pretrained(self, folder: Path | str, extra: Mapping[str, JsonValue] | None = None) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`.

        A method that PEFT has too is written as PEFT writes it, and `hificl.json` beside it says the rest.

        Args:
            folder: made if needed.
            extra: free record kept beside the configuration (backbone name, data digest, trial key).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {self.saved_name(name): x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        record = asdict(AdapterConfig(self.name, self.options.plain(), self.backbone, {**self.extra, **(extra or {})}))
        peft = self.peft_config()
        (folder / RECORD_FILE).unlink(missing_ok=True)  # of another that was saved here
        files = {CONFIG_FILE: record} if peft is None else {CONFIG_FILE: peft, RECORD_FILE: record}
        for name, content in files.items():
            text = json.dumps(content, indent=2, sort_keys=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")

    def push_to_hub(
        self, repository: str, base: str, *, revision: str | None = None, hub: Path | None = None, private: bool = True
    ) -> str:
        """Save it with a model card on the hub, and return where it lies.

        Args:
            repository: `organisation/name`.
            base: its backbone, by its name on the hub; `revision` of it.
            revision: see `base`.
            hub: a folder that stands for the hub.
            private: whether a repository that is made is seen by its owner alone.

        Raises:
            InputError: no name of a repository, or one that is taken in `hub`.
            WorkError: the hub refuses, or is not reached.
        """
        config = AdapterConfig(self.name, self.options.plain(), self.backbone, self.extra)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), repository, card_of(config, base, revision), hub=hub, private=private)

    def saved_name(self, parameter: str) -> str:
        """Return what a parameter is called in `adapter_model.safetensors`."""
        return parameter

    def peft_config(self) -> Json | None:
        """Return what PEFT writes into `adapter_config.json`; None: it has no such method."""
        return None

    def read_weights(self, path: Path) -> None:
        """Load saved tensors in place; saved ones may be of another float dtype.

        Raises:
            InputError: the file is missing or damaged, or its tensors have other names or shapes.
        """
        self.check_weights(path)
        try:
            saved = load_file(path)
            self.load_state_dict({parameter: saved[name] for name, parameter in self._own_names(saved).items()})
        except (OSError, SafetensorError) as error:
            raise InputError(f"not readable: {error}", where=str(path)) from None

    def check_weights(self, path: Path) -> None:
        """Compare names and shapes with those in the head of a file of saved tensors; none of these is read.

        Raises:
            InputError: as `read_weights`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                saved = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError) as error:
            raise InputError(f"not readable: {error}", where=str(path)) from None
        state = self.state_dict()
        expected = {name: list(state[parameter].shape) for name, parameter in self._own_names(saved).items()}
        for name in sorted(expected.keys() | saved.keys()):
            wanted, given = (shapes.get(name, "absent") for shapes in (expected, saved))
            if wanted != given:
                problem = f"tensor {name}: the configuration asks for {wanted}, the file has {given}"
                raise InputError(problem, where=str(path))

    def _own_names(self, saved: Container[str]) -> dict[str, str]:
        """Return {name in a file: parameter}; one that was written before PEFT's layout has the parameters' names."""
        return {name if name in saved else self.saved_name(name): name for name in self.state_dict()}


# Runs states [n, D] through the decoder as it is, right before position 0; gives keys and values [L, H_kv, n, d].
Prefill = Callable[[Tensor], tuple[Tensor, Tensor]]


def card_of(
    config: AdapterConfig, base: str, revision: str | None = None, facts: Json | None = None,
    scores: Sequence[Score] = (),
) -> Card:  # fmt: skip
    """Return the model card of a saved adapter.

    Args:
        config: what it is.
        base: its backbone, by its name on the hub; `revision` of it.
        revision: see `base`.
        facts: what is known of its making, beside what it notes itself.
        scores: of its settings.
    """
    method = METHODS.get(config.method)
    noted = {name: value for name, value in config.extra.items() if isinstance(value, str | int | float)}
    peft = method.peft_config is not Adapter.peft_config
    about = inspect.cleandoc(method.__doc__ or config.method)
    return Card(config.method, about, config.options, base, revision, {**noted, **(facts or {})}, scores, peft)


class AttentionAdapter(Adapter):
    """A method that adds virtual tokens to every decoder layer's attention.

    `forward()` returns them for all layers at once, so that one product per forward pass serves the whole decoder
    (and so that ZeRO-3 gathers sharded parameters at a module's call).
    """

    replaces: bool = True  # whether virtual tokens take their mass from the context (see `attention.py`)
    prefills: ClassVar[bool] = False  # whether `forward` is given a `Prefill`
    routes: ClassVar[bool] = False  # whether `forward` gives a `router` [L, H, n, d]: see `AttentionEdit.attend`

    def __init__(self, options: AnyOptions, spec: DecoderSpec, init: Init) -> None:
        super().__init__(options, spec, init)
        if cap := getattr(spec.text_config, "attn_logit_softcapping", None):
            raise InputError(
                f"the attention of {spec.model_type} caps its scores at {cap:g}: no sum Z2 of exponentials is left",
                where=f"method '{self.name}'", way_out="Use a method that leaves attention alone: live, lora",
            )  # fmt: skip

    def forward(self) -> dict[str, Tensor]:
        """Return `keys` [L, H, n, d], `values` [L, H, n, d]; optional `bias` [L, H, n] and `linear` [L, H, d, d]."""
        raise NotImplementedError

    @property
    def num_virtual(self) -> int:
        """How many virtual tokens a head attends to."""
        return self()["keys"].shape[2]


class HiddenAdapter(Adapter):
    """A method that edits a state of every decoder layer: the FFN's output, attention's, or the residual stream."""

    state: Literal["mlp", "residual", "attention"] = "mlp"  # what is edited

    def forward(self) -> dict[str, Tensor]:
        """Return what `edited` takes, stacked over layers: vectors [L, D], matrices [L, D, r] or [L, r, D].

        In a pack it is padded with zeros to the widest r, which must change nothing.
        """
        raise NotImplementedError

    @staticmethod
    def edited(x: Tensor, **given: Tensor) -> Tensor:
        """Return the state x [B, T, D], in fp32, as edited by one layer's tensors; here by LIVE's `shift` [D].

        x <- (x + shift) |x| / |x + shift|. In a pack the tensors are each row's own: [B, 1, D], [B, D, r].
        """
        moved = x + given["shift"]
        norms = [torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (x, moved)]
        return moved * (norms[0] / norms[1].clamp_min(torch.finfo(x.dtype).tiny))


class WeightsAdapter(Adapter):
    """A method that updates the weights of projections."""

    def injected(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which `model` computes with the updated weights."""
        raise NotImplementedError


def parts_of(adapters: Sequence[Adapter], kind: type[Adapter]) -> Iterator[tuple[int, Any]]:
    """Yield (index of the adapter, part) for every part of one kind."""
    for index, adapter in enumerate(adapters):
        for part in adapter.parts:
            if isinstance(part, kind):
                yield index, part
