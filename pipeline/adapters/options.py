"""A method's own options and the facts that follow from them; no model is needed to read either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from pipeline.config.trial import Kind, State
from pipeline.core.errors import validate
from pipeline.core.plain_yaml import Json

_COUNTS = ContextVar("counts", default=False)


@contextmanager
def counted_only() -> Iterator[None]:
    """Let options inside the block be believed where a package that takes seconds to import would check them."""
    token = _COUNTS.set(True)
    try:
        yield
    finally:
        _COUNTS.reset(token)


def are_counted_only() -> bool:
    """Return whether this is inside `counted_only`."""
    return _COUNTS.get()


@dataclass(frozen=True)
class Facts:
    """How a method is trained, as its paper prints it.

    Attributes:
        teacher: None, or what is taken from the frozen model on demonstrations and query: hidden states or logits.
        state: which of a layer's hidden states are compared.
        alignment_weight: factor on the teacher's loss (MSE of hidden states, or KL of logits).
        ground_truth_weight: factor on the cross-entropy of the answer.
        learning_rate: the paper's.
        trains_vision: whether gradients reach the vision tower, so that visual tokens cannot be computed once.
        packable: whether several such adapters can share one forward pass, row by row.
        drops: whether training draws dropout, a mask of its own for every token of every sample.
        reads_weights: whether it is made of the backbone's weights each time that it is attached.
        starts: whether it starts from what the frozen model makes of demonstrations (`Adapter.start`).
    """

    teacher: Literal["hidden", "logits"] | None = None
    state: State = "mlp"
    alignment_weight: float = 0.0
    ground_truth_weight: float = 1.0
    learning_rate: float = 5e-3
    trains_vision: bool = False
    packable: bool = True
    drops: bool = False
    reads_weights: bool = False
    starts: bool = False

    @property
    def is_shown(self) -> bool:
        """Whether training asks for demonstrations: a teacher's, or those that the method starts from."""
        return self.starts or self.teacher is not None

    @property
    def kind(self) -> Kind | None:
        """What a teacher's pass has to give; None without a teacher."""
        if self.teacher is None:
            return None
        return ("hidden", self.state) if self.teacher == "hidden" else ("logits", "")

    def taught_by(self, teacher: bool | Literal["logits"]) -> Facts:
        """Return the same with a teacher's loss + 0.5 cross-entropy (MimIC Sec. 3.2, lambda; LIVE), or without one.

        Args:
            teacher: true: MimIC's alignment of hidden states; logits: LIVE's KL between answers' distributions.
        """
        if teacher is False:
            return replace(self, teacher=None, state="mlp")
        kind: Literal["hidden", "logits"] = "hidden" if teacher is True else "logits"
        return replace(self, teacher=kind, alignment_weight=1.0, ground_truth_weight=0.5)


@dataclass(frozen=True)
class PublishedDecoding:
    """How a method's published code writes answers; the defaults are MimIC's, which runs the baselines too.

    Attributes:
        num_beams: 1 is greedy.
        length_penalty: exponent of the length that a beam's log-probability is divided by.
        max_new_tokens: None: the task's own (10, captions 20), as MimIC has them.
    """

    num_beams: int = 3
    length_penalty: float = 0.0
    max_new_tokens: int | None = None


class Options(BaseModel):
    """Base of a method's options: frozen, unknown keys refused with the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    published_decoding: ClassVar[PublishedDecoding] = PublishedDecoding()
    # Whether the demonstrations that it draws stand before each question; else something is read from them beforehand.
    answers_with_demonstrations: ClassVar[bool] = True
    # Options that came later, with the values that records and adapters of before mean by leaving them out.
    later: ClassVar[Mapping[str, Any]] = {}
    # Of these, the ones that are not written where they are as before: the trials' keys of before stay.
    unwritten: ClassVar[Mapping[str, Any]] = {}

    def facts(self) -> Facts:
        """Return how the method is trained with these options."""
        return Facts()

    def selects(self) -> bool:
        """Whether the method looks at the selection split: one that trains chooses its epoch there."""
        return True

    @property
    def drawn(self) -> int:
        """How many demonstrations the method itself draws for a prompt; 0: it draws none."""
        shots = self.plain().get("num_shots")
        return shots if isinstance(shots, int) else 0

    @property
    def shots(self) -> int:
        """How many demonstrations the method itself puts before each question; 0: it puts none."""
        return self.drawn if self.answers_with_demonstrations else 0

    def plain(self) -> Json:
        """Return them as JSON values, which a trial's key is made from."""
        return self.model_dump(mode="json")

    @classmethod
    def checked(cls, given: Mapping[str, Any], method: str) -> Self:
        """Validate options as a user wrote them.

        Raises:
            InputError: unknown option (with the nearest name), or a value that does not fit.
        """
        return validate(cls, dict(given), f"method '{method}'", noun="option")

    @classmethod
    def completed(cls, recorded: Mapping[str, Any]) -> Json:
        """Return the options of a record or a saved adapter with those that its time did not know."""
        options: Json = {**cls.later, **recorded}
        for name, field in cls.model_fields.items():
            section, given = field.annotation, options.get(name, {})
            if isinstance(section, type) and issubclass(section, Options) and isinstance(given, dict):
                options[name] = section.completed(given)
        return options


Taught = (
    bool | Literal["logits"]
)  # by nothing (false), by MimIC's alignment of hidden states (true), or by LIVE's KL of answers


class TeacherOptions(Options):
    """Options of a method that can be taught besides its own loss."""

    later: ClassVar[Mapping[str, Any]] = {"point": "residual"}
    teacher: Taught = False
    # what is compared: the output of the FFN or of attention, or the residual stream behind the FFN
    point: Literal["mlp", "residual", "attention"] = "mlp"

    def taught(self, facts: Facts) -> Facts:
        """Return `facts` with the teacher's loss and half the cross-entropy, where there is a teacher."""
        return replace(facts, state=self.point).taught_by(self.teacher)

    @model_serializer(mode="wrap")
    def _plain(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the point where nothing is compared: trials that differ in nothing share a key."""
        return {
            name: value
            for name, value in serialise(self).items()
            if (self.teacher is True or name != "point") and self.unwritten.get(name, ...) != value
        }
