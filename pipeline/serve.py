"""`hificl serve`: OpenAI's chat completions, with pictures, from one resident backbone and an adapter by request.

The name of a request's `model` is an adapter's. Its question and picture stand in the prompt that the adapter was
trained with, so the answer is that of `hificl predict`; `evaluate.continuous` answers all requests at once.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from pipeline.adapters.base import Adapter
from pipeline.backbones.load import DTYPES, Loaded
from pipeline.core import machine
from pipeline.core.errors import HificlError, InputError, nearest, validate
from pipeline.core.files import secret
from pipeline.core.plain_yaml import Json
from pipeline.core.progress import say
from pipeline.evaluate.answerer import Answerer, load_backbone, project_around
from pipeline.evaluate.continuous import End, Engine, Member, Question

MAX_BODY = 32 << 20  # bytes of a request: a picture of 24 MB in base64
MOST_NEW_TOKENS = 1024
MOST_STOPS, LONGEST_STOP = 4, 100
TOKEN, ADMIN_TOKEN = "HIFICL_SERVE_TOKEN", "HIFICL_SERVE_ADMIN_TOKEN"  # names of variables
GRACE_SECONDS = 30  # in which answers that are under way end
_LEAST_SECRET = 16  # characters
_DECODED_AT_ONCE = 2  # pictures: one within the limit may take a gigabyte
_LOOK_SECONDS = 1.0  # between two looks whether a client is still there
_NAME = re.compile(r"[\w][\w.+:@-]{0,99}")
Body = TypeVar("Body", bound=BaseModel)
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ImageUrl(_Strict):
    url: str
    detail: str | None = None  # the backbone has one size of picture


class _Part(_Strict):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | None = None


class _Message(_Strict):
    role: str
    content: str | list[_Part]
    name: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Chat(_Strict):
    """What is read of a request; what would change an answer and is not offered is refused by name."""

    model: str
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_NEW_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_NEW_TOKENS)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=0)  # an answer is the likeliest one
    top_p: float | None = Field(default=None, ge=1, le=1)
    n: int | None = Field(default=None, ge=1, le=1)
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None


class _Load(_Strict):
    name: str
    folder: str


class _Refused(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: HificlError) -> _Refused:
        """Return what was found wrong with a request, without a command line's way out."""
        return cls(400, error.what) if isinstance(error, InputError) else cls(503, error.what, kind="server_error")


@dataclass(frozen=True)
class Secrets:
    """Who may ask, and who may change what is served.

    Attributes:
        token: for questions and metrics.
        admin: for adapters.
        says: where they are, for people.
    """

    token: str
    admin: str
    says: str

    @classmethod
    def found(cls, folder: Path) -> Secrets:
        """Return those of the environment, or of two files in `folder` of mode 600, made at their first use.

        Raises:
            InputError: one that is short enough to be guessed, or the same for both.
        """
        values, says = [], []
        for variable, name in ((TOKEN, "token"), (ADMIN_TOKEN, "admin-token")):
            value = os.environ.get(variable)
            if not value:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                value = secret(folder / name, 32)
            says.append(variable if os.environ.get(variable) else str(folder / name))
            if len(value) < _LEAST_SECRET:
                way_out = "Give a longer one, or none, and one is made"
                raise InputError(f"has fewer than {_LEAST_SECRET} characters", where=says[-1], way_out=way_out)
            values.append(value)
        if values[0] == values[1]:
            raise InputError("is also the token for questions", where=says[1], way_out="Give another one")
        return cls(values[0], values[1], f"token: {says[0]}; for adapters: {says[1]}")


@dataclass(frozen=True)
class _Served:
    answerer: Answerer
    member: Member
    since: int = field(default_factory=lambda: int(time.time()))


class Service:
    """The adapters that are served on one backbone, and what is counted of them.

    Args:
        backbone: its name.
        loaded: in memory.
        project: the folder of params.yaml.
        root: where adapters that are loaded on request may lie.
        most_rows: questions in one pass.
        most_waiting: questions that wait beside these.
    """

    def __init__(
        self, backbone: str, loaded: Loaded, *, project: Path, root: Path, most_rows: int, most_waiting: int
    ) -> None:
        self.backbone, self.loaded, self.project, self.root = backbone, loaded, project, root.resolve()
        self.engine = Engine(loaded, most_rows=most_rows, most_waiting=most_waiting)
        self.served: dict[str, _Served] = {}
        self._changing = threading.Lock()
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hificl_requests", "answers by adapter and end", ["model", "end"], registry=self.registry
        )
        self.tokens = Counter("hificl_tokens", "tokens read and written", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            "hificl_request_seconds", "from a question to its whole answer", registry=self.registry
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "hificl_in_flight": ("questions in the batch", lambda: self.engine.in_flight),
            "hificl_waiting": ("questions that wait", lambda: self.engine.waiting),
            "hificl_adapters": ("adapters served", lambda: len(self.served)),
            "hificl_passes": ("forward passes so far", lambda: self.engine.passes),
            "hificl_answered_alone": ("questions answered by themselves", lambda: self.engine.answered_alone),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def add(self, name: str, folder: Path) -> None:
        """Serve the adapter in a folder by a name.

        Raises:
            InputError: no such name, a name that is taken, no adapter, or one over another backbone.
        """
        if not _NAME.fullmatch(name):
            raise InputError(
                "is no name for an adapter", where=name[:80], way_out="Use letters, digits and . _ + : @ -"
            )
        with self._changing:
            self._add(name, folder)

    def _add(self, name: str, folder: Path) -> None:
        if name in self.served:
            raise InputError("an adapter of this name is served", where=name, way_out="Unload it first")
        answerer = Answerer(folder, project=self.project, reads_files=False, backbone=self.backbone)
        precision = next(kind for kind, dtype in DTYPES.items() if dtype == self.loaded.dtype)
        for trait, present, wanted in (
            ("backbone", self.backbone, answerer.origin["backbone"]),
            ("precision", precision, answerer.origin.get("precision", precision)),
            ("quantize", self.loaded.quantized, answerer.origin.get("quantize", "none")),
        ):
            if present != wanted:
                # a backbone is loaded as the first adapter's record says; without one, as params.yaml says
                command = f"hificl serve --backbone {answerer.origin['backbone']} --adapter {name}={folder}"
                way_out = f"Serve it with another `{command}`"
                problem = f"was trained with {trait} {wanted}, this server has {present}"
                raise InputError(problem, where=name, way_out=way_out)

        def made() -> Member:
            adapter: Adapter = answerer.adapter_on(self.loaded)
            return Member(adapter, partial(answerer.said, self.loaded, adapter))

        self.served[name] = _Served(answerer, self.engine.add(made))

    def remove(self, name: str) -> None:
        """Serve an adapter no longer; what was asked before is answered.

        Raises:
            InputError: none of this name is served.
        """
        with self._changing:
            if name not in self.served:
                raise InputError(f"no adapter '{name[:80]}' is served")
            self.engine.remove(self.served.pop(name).member)


class _Asked:
    """One request on its way: what the engine's thread tells, in the loop's own."""

    def __init__(self, service: Service, chat: _Chat) -> None:
        self.service, self.chat, self.name = service, chat, f"chatcmpl-{uuid.uuid4().hex}"
        self.created, self.began = int(time.time()), time.monotonic()
        self.told: asyncio.Queue[tuple[str, End | None]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.files = ExitStack()
        self.question: Question

    def prepare(self) -> None:
        """Check the question, write its picture down, and put it into the adapter's prompt; takes a moment."""
        served = _known(self.service, self.chat.model)
        messages, self.chat.messages = self.chat.messages, []  # a picture is not kept until the answer
        image, text = _asked_of(messages)
        answerer, loaded = served.answerer, self.service.loaded
        sample = self.files.enter_context(answerer.asked(image, text or None, loaded))
        prompt = answerer.prompt(loaded, sample)
        most = self.chat.max_completion_tokens or self.chat.max_tokens or answerer.max_new_tokens
        further = [self.chat.stop] if isinstance(self.chat.stop, str) else self.chat.stop or []
        if len(further) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in further):
            message = f"takes {MOST_STOPS} texts of {LONGEST_STOP} characters at most"  # looked for at each token
            raise _Refused(400, f"stop {message}", param="stop")
        stops = (*answerer.stops(loaded), *filter(None, further))
        self.question = Question(served.member, prompt, most, stops, self._heard)

    def _heard(self, text: str, end: End | None) -> None:
        if end is None and not self.chat.stream:
            return  # or `events` would never look whether the client is still there
        if end is not None:
            self.files.close()  # the engine does not look at the picture again
            service, labels = self.service, (self.chat.model, end.reason)
            service.requests.labels(*labels).inc()
            service.tokens.labels("written").inc(end.tokens)
            service.tokens.labels("read").inc(len(self.question.prompt))
            service.seconds.observe(time.monotonic() - self.began)
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.told.put_nowait, (text, end))

    async def events(self, request: Request) -> AsyncIterator[tuple[str, End | None]]:
        """Give what is told until the end; a client that has left takes its question out of the batch."""
        try:
            while True:
                try:
                    text, end = await asyncio.wait_for(self.told.get(), _LOOK_SECONDS)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                yield text, end
                if end is not None:
                    return
        finally:
            self.service.engine.cancel(self.question)

    def chunk(self, delta: Json | None, *, reason: str | None = None, usage: Json | None = None) -> bytes:
        """Return one event of a stream."""
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        body = {**self._head("chat.completion.chunk"), "choices": choices}
        if self.chat.stream_options is not None and self.chat.stream_options.include_usage:
            body["usage"] = usage
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def whole(self, text: str, end: End) -> Json:
        """Return the answer of a request without a stream."""
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        choice: Json = {"index": 0, "message": message, "finish_reason": end.reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage(end)}

    def usage(self, end: End) -> Json:
        """Return how many tokens were read and written."""
        read = len(self.question.prompt)
        return {"prompt_tokens": read, "completion_tokens": end.tokens, "total_tokens": read + end.tokens}

    def _head(self, kind: str) -> Json:
        digest = self.service.loaded.digest[:12]
        return {
            "id": self.name, "object": kind, "created": self.created, "model": self.chat.model,
            "system_fingerprint": f"{self.service.backbone}-{digest}",
        }  # fmt: skip


def _asked_of(messages: list[_Message]) -> tuple[str | None, str]:
    """Return the picture, in base64, and the question of a request's one message.

    Raises:
        _Refused: a conversation, several pictures, or one that is not in the request itself.
    """
    if len(messages) != 1 or messages[0].role != "user":
        message = "an adapter answers one message of the user, in the prompt that it was trained with"
        raise _Refused(400, message, param="messages")
    content = messages[0].content
    parts = [_Part(type="text", text=content)] if isinstance(content, str) else content
    texts = [part.text or "" for part in parts if part.type == "text"]
    urls = [part.image_url.url if part.image_url else "" for part in parts if part.type == "image_url"]
    if len(urls) > 1:
        raise _Refused(400, f"{len(urls)} pictures, where one is taken", param="messages")
    if urls and not _DATA_URL.match(urls[0]):
        message = "a picture is taken as a data: URL (data:image/png;base64,...) alone: nothing is fetched or opened"
        raise _Refused(400, message, param="messages", code="invalid_image_url")
    return (urls[0] if urls else None), "\n".join(texts)


def application(service: Service, secrets: Secrets) -> FastAPI:
    """Return the server's routes; `/health` alone asks for no token."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    decoding = asyncio.Semaphore(_DECODED_AT_ONCE)

    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = _Refused(error.status_code, str(error.detail))
        elif isinstance(error, HificlError):
            error = _Refused.of(error)
        elif not isinstance(error, _Refused):  # uvicorn writes it into the log
            error = _Refused(500, "the server failed; its log says why", kind="server_error")
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
        return JSONResponse(error.body, error.status, headers=headers.get(error.status))

    for kind in (_Refused, HificlError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)

    def allow(request: Request, wanted: str) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            raise _Refused(401, "no or another token: give it as `Authorization: Bearer ...`", code="invalid_api_key")

    @app.get("/health")
    async def health() -> Json:
        if not service.engine.is_alive:
            raise _Refused(503, "the server takes no questions", kind="server_error")
        return {"status": "ok", "backbone": service.backbone, "in_flight": service.engine.in_flight}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        allow(request, secrets.token)
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(request: Request) -> Json:
        allow(request, secrets.token)
        return {"object": "list", "data": [_model(service, *row) for row in list(service.served.items())]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Json:
        allow(request, secrets.token)
        return _model(service, name, _known(service, name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        allow(request, secrets.token)
        return await _answered(service, request, decoding)

    @app.post("/admin/adapters")
    async def load(request: Request) -> Json:
        allow(request, secrets.admin)
        given = await _read(request, _Load)
        folder = (service.root / given.folder).resolve()
        if not folder.is_relative_to(service.root):
            raise _Refused(400, "the folder is not below the server's --adapters-under", param="folder")
        await run_in_threadpool(service.add, given.name, folder)
        say(f"serving {given.name}")
        return _model(service, given.name, _known(service, given.name))

    @app.delete("/admin/adapters/{name}")
    async def unload(request: Request, name: str) -> Json:
        allow(request, secrets.admin)
        _known(service, name)
        await run_in_threadpool(service.remove, name)
        say(f"no longer serving {name}")
        return {"id": name, "object": "model", "deleted": True}

    return app


async def _answered(service: Service, request: Request, decoding: asyncio.Semaphore) -> Response:
    """Answer a request for a chat completion."""
    full = _Refused(429, "too many questions wait", kind="rate_limit_error", code="rate_limit_exceeded")
    if service.engine.is_full:
        raise full
    asked = _Asked(service, await _read(request, _Chat))
    try:
        async with decoding:
            await run_in_threadpool(asked.prepare)
        if service.engine.is_full:  # meanwhile
            raise full
        service.engine.ask(asked.question)
    except BaseException:
        asked.files.close()
        raise
    if asked.chat.stream:
        return StreamingResponse(_stream(asked, request), media_type="text/event-stream")
    async for text, end in asked.events(request):
        if end is not None:
            if end.reason == "error":
                raise _Refused(500, "the question could not be answered; the log says why", kind="server_error")
            return JSONResponse(asked.whole(text, end))
    return Response(status_code=499)  # nobody is there to read it


def _known(service: Service, name: str) -> _Served:
    served = service.served.get(name)
    if served is None:
        message = f"no adapter '{name[:80]}' is served. {nearest(name[:80], list(service.served))}"
        raise _Refused(404, message, param="model", code="model_not_found")
    return served


def _model(service: Service, name: str, served: _Served) -> Json:
    task = served.answerer.task
    about = {"method": served.answerer.config.method, "task": task.name if task else None}
    return {"id": name, "object": "model", "created": served.since, "owned_by": service.backbone, **about}


async def _read(request: Request, kind: type[Body]) -> Body:
    """Return a request's body, of a limited size."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise _Refused(413, f"more than {MAX_BODY >> 20} MiB", code="request_too_large")
        parts.append(part)

    def read() -> Body:
        try:
            raw = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the body is no JSON ({type(error).__name__})") from None
        try:
            return validate(kind, raw, where="body", noun="field")
        except InputError as error:
            field = re.match(r"(?:unknown field ')?([\w.]+)", error.what)
            raise _Refused(400, str(error), param=field and field[1]) from None

    return await run_in_threadpool(read)


async def _stream(asked: _Asked, request: Request) -> AsyncIterator[bytes]:
    """Give an answer's events as its tokens come."""
    sent = ""
    yield asked.chunk({"role": "assistant", "content": ""})
    async for text, end in asked.events(request):
        if text.startswith(sent) and text != sent:
            yield asked.chunk({"content": text[len(sent) :]})
            sent = text
        if end is None:
            continue
        if end.reason == "error":
            error = _Refused(500, "the question could not be answered; the log says why", kind="server_error")
            yield b"data: " + json.dumps(error.body).encode() + b"\n\n"
            return
        yield asked.chunk({}, reason=end.reason)
        if asked.chat.stream_options is not None and asked.chat.stream_options.include_usage:
            yield asked.chunk(None, usage=asked.usage(end))
        yield b"data: [DONE]\n\n"


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    backbone: str, adapters: Mapping[str, Path], *, host: str, port: int, exposed: bool,
    secrets_in: Path, root: Path, most_rows: int, most_waiting: int,
) -> None:  # fmt: skip
    """Serve until interrupted or told to end, which lets answers that are under way end.

    Args:
        backbone: its name.
        adapters: folders of trials' adapters, by the name that a request gives as its model. The params.yaml around the
            first says where weights lie.
        host: address to listen at.
        port: to listen at; 0: a free one.
        exposed: listen where other machines can ask.
        secrets_in: folder of the tokens that the environment does not give.
        root: where adapters that are loaded on request may lie.
        most_rows: questions in one pass.
        most_waiting: questions that wait beside these.

    Raises:
        InputError: an address that is not this machine's alone, or in use; no such backbone, or an adapter of another.
    """
    if not is_loopback(host) and not exposed:
        way_out = "Give --expose, and put a proxy with TLS in front: the token travels as it is"
        raise InputError("other machines would reach the server", where=f"--host {host}", way_out=way_out)
    secrets = Secrets.found(secrets_in)
    first = next(iter(adapters.values()), None)
    project = Path() if first is None else project_around(first)
    origin = {} if first is None else Answerer(first, project=project, backbone=backbone).origin
    with machine.listening(host, port) as listening:
        loaded = load_backbone(backbone, project, origin)
        service = Service(backbone, loaded, project=project, root=root, most_rows=most_rows, most_waiting=most_waiting)
        service.engine.start()
        for name, folder in adapters.items():
            service.add(name, folder)
        port = listening.getsockname()[1]
        say(f"serving {', '.join(service.served) or 'no adapter yet'} on {backbone}: http://{_shown(host)}:{port}/v1")
        say(secrets.says)
        machine.answer(application(service, secrets), listening, grace=GRACE_SECONDS)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
