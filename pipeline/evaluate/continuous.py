"""Continuous batching over one resident backbone: questions to different adapters join and leave between two tokens.

All questions in flight are rows of one forward pass, each with its own adapter (`adapters.pack`) and its own share of
one cache of keys and values, padded on the left. A new one is read in a pass of its own and its cache laid beside the
others'; one that has ended is taken out.

A batch may round otherwise than a row alone. So where the two best tokens are closer than rounding can tell
(`_UNSURE`), the question is answered once more by itself, as `hificl predict` does it: the answer does not depend on
what shares the batch. Backbones whose positions depend on the images of a whole prompt (`Family.shares_prefix`) are
asked one question after another.
"""

from __future__ import annotations

import re
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.adapters.attach import attach
from pipeline.adapters.base import Adapter
from pipeline.adapters.pack import Pack
from pipeline.backbones.base import placed
from pipeline.backbones.decoder import told
from pipeline.backbones.load import Loaded
from pipeline.backbones.passes import is_out_of_memory
from pipeline.core.errors import InputError, WorkError
from pipeline.evaluate.generate import cut_at_stop
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import Encoded
from pipeline.resident.visual_tokens import VisualTokens

# Share of the largest logit by which two tokens must differ, so that no order of summation makes the other one best.
_UNSURE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float64: 1e-13}
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte: what a run of them is read as, its end decides


@dataclass(frozen=True, eq=False)
class Member:
    """An adapter that is served.

    Attributes:
        adapter: on the backbone.
        alone: answers a prompt by itself, with at most so many tokens, cut at these strings.
    """

    adapter: Adapter
    alone: Callable[[Encoded, int, tuple[str, ...]], str]


@dataclass(frozen=True)
class End:
    """How an answer ended: at its own end, at its most tokens, or not at all; and how many tokens it has."""

    reason: Literal["stop", "length", "error", "cancelled"]
    tokens: int = 0


@dataclass(eq=False)
class Question:
    """A question in flight.

    Attributes:
        member: who is asked.
        prompt: what the backbone reads.
        max_new_tokens: most tokens of the answer.
        stops: the answer is cut where one of them begins.
        heard: called by the engine's thread with the part of the answer that is certain, and once with its end.
    """

    member: Member
    prompt: Encoded
    max_new_tokens: int
    stops: tuple[str, ...]
    heard: Callable[[str, End | None], None]
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    ended: bool = False

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are known: all but the newest."""
        return len(self.prompt) + len(self.tokens) - 1

    def end(self, text: str, end: End) -> None:
        """Tell the whole answer."""
        self.ended = True
        self.heard(text, end)


def certain(text: str, stops: Sequence[str]) -> str:
    """Return the part of an unfinished answer that no further token changes."""
    ends = [len(text) - n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
    return text[: min(ends, default=len(text))].rstrip("\ufffd").strip()


class Engine:
    """Answers questions to the members of one backbone, on a thread of its own.

    Args:
        loaded: the backbone. Nobody else may use it while the engine runs.
        most_rows: questions in one pass.
        most_waiting: questions that wait beside these.
        unsure: share of the largest logit by which the two best tokens must differ for a batch to choose; None: by the
            backbone's type.
    """

    def __init__(
        self, loaded: Loaded, *, most_rows: int = 32, most_waiting: int = 256, unsure: float | None = None
    ) -> None:
        self.loaded, self.most_rows, self.most_waiting = loaded, most_rows, most_waiting
        self.unsure = _UNSURE[loaded.dtype] if unsure is None else unsure
        self.joins = loaded.family.shares_prefix
        self.passes, self.answered_alone = 0, 0
        self._visual = VisualTokens(loaded, None)
        self.members: list[Member] = []  # that are served; once the engine is started, `add` and `remove` change them
        self._rows: list[Question] = []
        self._cache: Any = None
        self._attached = ExitStack()
        self._pack: Pack | None = None  # that is attached
        self._kept: Pack | None = None  # attached or not, with what was made of its members
        self._packed: list[Member] = []  # its members
        self._waiting: deque[Question] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._ending, self._changed = False, threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End when all that is in flight is answered; what is asked later is refused."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether questions are taken."""
        return self._thread.is_alive() and not self._ending

    @property
    def in_flight(self) -> int:
        """Questions that are being answered."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether another question is refused."""
        return len(self._waiting) >= self.most_waiting

    def ask(self, question: Question) -> None:
        """Take a question; its `heard` tells the rest.

        Raises:
            WorkError: too many wait, or the engine ends.
        """
        with self._changed:
            if self._ending or self.is_full:
                raise WorkError("the server ends" if self._ending else "too many questions wait")
            self._waiting.append(question)
            self._changed.notify()

    def cancel(self, question: Question) -> None:
        """Forget a question; it leaves its batch at the next token."""
        question.cancelled = True

    def add(self, make: Callable[[], Member]) -> Member:
        """Serve another adapter from the next token on; `make` reads it while nothing is attached.

        Raises:
            InputError: as `make`, or a method that does not share a pass with others.
        """

        def added() -> Member:
            member = make()
            if self.members and not all(each.adapter.packable for each in (member, *self.members)):
                problem = f"method '{member.adapter.name}' shares no pass with others"
                raise InputError(problem, way_out="Serve it by itself")
            self.members.append(member)
            return member

        return self._between(added)

    def remove(self, member: Member) -> None:
        """Serve an adapter no longer; questions that were asked before are answered."""
        self._between(lambda: self.members.remove(member))

    def _between(self, work: Callable[[], Any]) -> Any:
        """Run `work` between two tokens, with nothing attached; here, before the engine has begun to answer."""
        done: Future[Any] = Future()
        with self._changed:
            if self._ending:
                raise WorkError("the server ends")
            if self._thread.ident is None:
                return work()
            self._jobs.append((work, done))
            self._changed.notify()
        return done.result()

    def answer_all(self) -> None:
        """Answer what has been asked, on the caller's thread; for an engine that is not started."""
        while self._has_work:
            self._turn()
        self._detach()

    def _run(self) -> None:
        try:
            while not self._ending or self._has_work:  # nothing is added once it ends
                with self._changed:
                    while not (self._has_work or self._ending):
                        self._changed.wait()
                self._turn()
        finally:  # what nobody foresaw ends the engine, and leaves nobody waiting
            with self._changed:
                self._ending = True
            for _, done in self._jobs:
                done.set_exception(WorkError("the engine has ended"))
            for row in (*self._rows, *self._waiting):
                row.end("", End("error"))
            self._detach()

    @property
    def _has_work(self) -> bool:
        return bool(self._jobs or self._waiting or self._rows)

    @torch.no_grad()
    def _turn(self) -> None:
        """Do what lies between two tokens, then write a token of every row."""
        with self._changed:
            jobs, new = list(self._jobs), list[Question]()
            self._jobs.clear()
            while self._waiting and len(self._rows) + len(new) < (self.most_rows if self.joins else 1):
                new.append(self._waiting.popleft())
        self._do(jobs)
        for row in (*self._rows, *new):
            if row.cancelled:
                row.end("", End("cancelled"))
        self._keep([row for row in self._rows if not row.ended])
        self._guarded([row for row in new if not row.ended], self._join)
        self._guarded(list(self._rows), self._decode)

    def _do(self, jobs: Sequence[tuple[Callable[[], Any], Future[Any]]]) -> None:
        for work, done in jobs:
            self._detach()
            try:
                done.set_result(work())
            except Exception as error:  # raised where the job was given
                done.set_exception(error)

    def _guarded(self, rows: Sequence[Question], work: Callable[[Sequence[Question]], None]) -> None:
        """Do a step; whatever goes wrong in a batch, each row that is in flight is answered alone."""
        if not rows:
            return
        try:
            work(rows)
            return
        except Exception as error:  # a row that fails by itself says so
            if is_out_of_memory(error):
                self.most_rows = max(1, len({*rows, *self._rows}) // 2)
            else:
                traceback.print_exc()
        failed = [row for row in dict.fromkeys([*self._rows, *rows]) if not row.ended]
        self._keep([])
        self._alone(failed)

    # ------------------------------------------------------------------------------------------------ what is attached

    def _attach(self, rows: Sequence[Question]) -> Pack:
        """Attach the members and those that have left but are still asked, by `rows` or in flight."""
        needed = list(dict.fromkeys([*self.members, *(row.member for row in (*self._rows, *rows))]))
        changed = self._kept is None or set(needed) != set(self._packed)
        if self._pack is None or self._kept is None or changed:
            self._detach()
            if self._kept is None or changed:
                self._packed, self._kept = needed, Pack([member.adapter for member in needed], fixed=True)
            self._pack = self._attached.enter_context(attach(self.loaded.model, self._kept))
        return self._pack

    def _detach(self) -> None:
        self._attached.close()
        self._pack = None

    def _use(self, pack: Pack, rows: Sequence[Question]) -> None:
        numbers = tuple(self._packed.index(row.member) for row in rows)
        if pack.rows is None or pack.rows.adapters != numbers:  # what was gathered for the same rows holds
            pack.use(numbers)

    # ------------------------------------------------------------------------------------------------------- the steps

    def _join(self, new: Sequence[Question]) -> None:
        """Read new questions: those that see visual tokens in one pass, each adapter of the vision tower by itself."""
        if not self.joins:
            self._alone(new)
            return
        seeing = [row for row in new if row.member.adapter.trains_vision]
        others = [row for row in new if row not in seeing]
        for row in seeing:
            with ExitStack() as alone:
                if len(self._attach([row]).adapters) > 1:
                    self._detach()
                    alone.enter_context(attach(self.loaded.model, row.member.adapter))
                read = self._read([row], pixels=self._visual.pixels([row.prompt.images], ""))
            self._take([row], *read)
        if any(member.adapter.trains_vision for member in self._packed):
            self._detach()  # the tower that makes visual tokens is the frozen one
        # one by one, as they are made where a question is alone
        visual = [tokens for row in others for image in row.prompt.images for tokens in self._visual.get([image])]
        if others:
            self._use(self._attach(others), others)
            self._take(others, *self._read(others, visual=visual or None))

    def _read(self, rows: Sequence[Question], **images: Any) -> tuple[Any, Tensor]:
        """Return the cache of prompts, and the logits of the first token behind each."""
        from transformers import DynamicCache

        batch = collate([row.prompt for row in rows], self.loaded, side="left", **images).to(self.loaded.device)
        padded = len({len(row.prompt) for row in rows}) > 1
        return self._pass(batch.model_inputs(self.loaded), DynamicCache(), padded=padded)

    def _pass(self, inputs: dict[str, Any], cache: Any, *, padded: bool) -> tuple[Any, Tensor]:
        self.passes += 1
        with told(self.loaded.device, padded=padded):
            out = self.loaded.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].to(copy=True, dtype=torch.float32)

    def _take(self, rows: Sequence[Question], cache: Any, logits: Tensor) -> None:
        """Lay the cache of new rows beside that of the others, and write their first token."""
        if self._rows:
            for layer, added in zip(self._cache.layers, cache.layers, strict=True):
                width = max(layer.keys.shape[-2], added.keys.shape[-2])
                for name in ("keys", "values"):
                    parts = [getattr(each, name) for each in (layer, added)]
                    setattr(layer, name, torch.cat([pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts]))
        else:
            self._cache = cache
        self._rows += rows
        self._write(rows, logits)

    def _decode(self, rows: Sequence[Question]) -> None:
        """Write a token of every row."""
        self._use(self._attach(rows), rows)
        lengths = torch.tensor([row.cached for row in rows])
        width, device = int(lengths.max()), self.loaded.device
        inputs = {
            "input_ids": torch.tensor([row.tokens[-1:] for row in rows]),
            "attention_mask": (torch.arange(width + 1) >= width - lengths[:, None]).long(),
            "position_ids": lengths[:, None],
        }
        moved = {name: placed(value, device) for name, value in inputs.items()}
        self._cache, logits = self._pass(moved, self._cache, padded=bool((lengths < width).any()))
        self._write(rows, logits)

    def _write(self, rows: Sequence[Question], logits: Tensor) -> None:
        """Add each row's best token, and take out those that have ended or whose best token is not certain."""
        scale = logits.abs().amax(-1)
        logits[:, self.loaded.never_generated] = float("-inf")
        best = logits.topk(2)
        unsure = (best.values[:, 0] - best.values[:, 1] <= self.unsure * scale).tolist()
        alone, ended = [], set()
        for row, token, close in zip(rows, best.indices[:, 0].tolist(), unsure, strict=True):
            if close:
                alone.append(row)
                continue
            row.tokens.append(token)
            text = self.loaded.tokenizer.decode(row.tokens, skip_special_tokens=True)
            stops = token in self.loaded.eos_token_ids or any(stop in text for stop in row.stops)
            if stops or len(row.tokens) == row.max_new_tokens:
                ended.add(row)
                row.end(cut_at_stop(text, row.stops), End("stop" if stops else "length", len(row.tokens)))
            elif not _BYTE.fullmatch(self.loaded.tokenizer.convert_ids_to_tokens(token) or ""):
                row.heard(certain(text, row.stops), None)
        self._keep([row for row in self._rows if row not in ended and row not in alone])
        self._alone(alone)

    def _keep(self, rows: Sequence[Question]) -> None:
        """Leave these rows alone in the batch, and no more padding in front of them than they need."""
        if len(rows) == len(self._rows):
            return
        places = [place for place, row in enumerate(self._rows) if row in rows]
        self._rows = list(rows)
        if not rows:
            self._cache = None
            return
        chosen, width = placed(torch.tensor(places), self.loaded.device), max(row.cached for row in rows)
        for layer in self._cache.layers:
            layer.keys = layer.keys.index_select(0, chosen)[:, :, -width:]
            layer.values = layer.values.index_select(0, chosen)[:, :, -width:]

    def _alone(self, rows: Sequence[Question]) -> None:
        for row in rows:
            self._detach()
            self.answered_alone += 1
            try:
                text = row.member.alone(row.prompt, row.max_new_tokens, row.stops)
            except Exception:  # the others go on
                traceback.print_exc()
                row.end("", End("error"))
                continue
            written = len(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
            row.end(text, End("length" if written >= row.max_new_tokens else "stop", written))
