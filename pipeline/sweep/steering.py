"""`hificl steer`: a page with a sweep's trials, their curves, and buttons for what is done to them by hand.

It reads the trial store, so it shows what any process trains there, on this machine or another, and it acts through
`sweep.recorded`, as the command line does. It listens on loopback alone. What it shows and does asks for a token, which
stands behind the `#` of its address: no browser sends that part to anybody.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipeline.config.load import FOLDERS, Params, with_study
from pipeline.core import machine
from pipeline.core.errors import HificlError, InputError
from pipeline.core.plain_yaml import Json
from pipeline.core.progress import say
from pipeline.plan.plan import Inputs, TrialRow, places, trial_rows
from pipeline.records.journal import Journal, sentence
from pipeline.records.store import TrialStore
from pipeline.records.trial import Act
from pipeline.sweep import recorded
from pipeline.sweep.mlflow_sync import curve
from pipeline.sweep.train import BY_HAND

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("steering.html")
_POINTS = 60  # of a curve on the page
_EVENTS = 8  # of the journal, the newest
_NONCE = "NONCE"  # in the page: its own script and style, and no others


class _Asked(BaseModel):
    """What a button asks for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    act: Literal["stop", "resume", "clone", "extend"]
    trial: str
    after: int | None = None
    epochs: int | None = None
    changes: dict[str, str] = {}  # of a clone: values of a setting, with commas between them


@dataclass(frozen=True)
class BoardRow:
    """A trial as the page shows it.

    Attributes:
        key: the trial's.
        study: that asks for it.
        row: of the study, with what varies, what is searched, and the seed.
        task: that it is trained on.
        backbone: that it is trained on.
        state: waiting, begun (whether it trains now is in the journal), to be stopped; or how it ended.
        epochs: those that are behind it, and of how many.
        score: of the last epoch, on the selection split, or the loss there.
        losses: of its steps, or means of some.
        by_hand: what was done to it.
        may: the acts that it allows.
    """

    key: str
    study: str
    row: str
    task: str
    backbone: str
    state: str
    epochs: str
    score: float | None
    losses: list[float]
    by_hand: str
    may: list[str]


class Board:
    """The trials of some studies, and of those that were made by hand.

    Args:
        params: the project's.
        studies: their names.
        root: the project's folder.

    Raises:
        InputError: weights or samples are missing.
    """

    def __init__(self, params: Params, studies: list[str], root: Path) -> None:
        self.params, self.studies, self.root = params, [s for s in studies if s != BY_HAND], root
        self.store = TrialStore(places(root).runs)
        self._journal, self._events = Journal(self.store.root, whole=True), deque[str](maxlen=_EVENTS)
        self._lock = Lock()  # the server answers in threads
        self._planned: tuple[int, list[TrialRow]] | None = None  # with the age of what was made by hand
        self._ended: dict[tuple[str, str], tuple[int, BoardRow]] = {}  # by study and trial, with the age of its end
        self.rows()

    def state(self) -> Json:
        """Return what the page shows."""
        with self._lock:
            for event in self._journal.news():
                at = datetime.fromtimestamp(event.time, UTC).isoformat(" ", "seconds")
                self._events.append(f"{at} {sentence(event.event, event.facts)}")
            return {"rows": [asdict(row) for row in self.rows()], "events": list(self._events)}

    def rows(self) -> list[BoardRow]:
        """Return the trials that are trained, study by study."""
        return [self._row(row, row.key) for row in self._plan() if row.trial.trained and row.key is not None]

    def act(self, asked: _Asked) -> list[Act]:
        """Do what is asked.

        Raises:
            InputError: it cannot be done to this trial.
            WorkError: it cannot be written.
        """
        with self._lock:
            key = recorded.full_key(self.store, asked.trial)  # of a trial that is there: no path of a stranger's
            match asked.act:
                case "stop":
                    return [recorded.stop(self.store, key, asked.after)]
                case "resume":
                    return [recorded.resume(self.store, key)]
                case "clone":
                    return recorded.clones(self.root, self.params, key, recorded.grid_of(asked.changes, "changes"))
                case "extend":
                    return [recorded.extend(self.root, self.params, key, asked.epochs or 0)]

    def _plan(self) -> list[TrialRow]:
        file = self.root / FOLDERS["studies"] / f"{BY_HAND}.yaml"
        age = file.stat().st_mtime_ns if file.exists() else 0
        if self._planned is None or self._planned[0] != age:
            params = with_study(self.params, BY_HAND, self.root)
            studies = [*self.studies, *([BY_HAND] if age else [])]
            Inputs(params, places(self.root)).digests(studies)  # raises where `trial_rows` would give no keys
            self._planned = age, trial_rows(params, studies, places(self.root), lambda key: False)
        return self._planned[1]

    def _row(self, planned: TrialRow, key: str) -> BoardRow:
        trial, done = self.store.trial(key), self.store.folder(key) / "done.json"
        age = done.stat().st_mtime_ns if done.exists() else 0
        place, config = (planned.study, key), planned.trial
        known = self._ended.get(place)
        if known is not None and known[0] == age:
            return known[1]
        end, reports = trial.end(), trial.epochs()
        stop, final = self.store.stop_of(key), end is not None and end.final
        state = end.status if end else "to be stopped" if stop else "begun" if reports else "waiting"
        may = {"stop": trial.begun and not (final or stop), "resume": stop is not None, "clone": trial.begun,
               "extend": end is not None and end.status == "finished"}  # fmt: skip
        last = reports[-1] if reports else None
        points = [f"{name} {value}" for name, value in {**planned.vary, **planned.searched}.items()]
        losses = [loss for _, loss in curve(trial.losses(), config.epochs)]
        row = BoardRow(
            key=key, study=planned.study, row=", ".join([planned.row, *points, f"seed {config.seed}"]),
            task=config.task, backbone=config.backbone, state=state, epochs=f"{len(reports)}/{config.epochs}",
            score=None if last is None else last.selection_loss if last.selection_score is None
            else last.selection_score,
            losses=losses[:: -(-len(losses) // _POINTS) or 1],
            by_hand="; ".join(act.told for act in self.store.acts(key)),
            may=[name for name, allowed in may.items() if allowed],
        )  # fmt: skip
        if final and age:
            self._ended[place] = age, row
        return row


def application(board: Board, token: str) -> FastAPI:
    """Return the page's server."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # a name that somebody lets stand for this address asks for nothing here
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    page = PAGE.read_text(encoding="utf-8")

    @app.middleware("http")
    async def asks(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if request.url.path != "/" and not hmac.compare_digest(given.encode(), token.encode()):
            return JSONResponse({"what": "no or another token: open the address that `hificl steer` printed"}, 401)
        return await answer(request)

    @app.exception_handler(HificlError)
    async def refused(request: Request, error: HificlError) -> Response:
        body = {"what": error.what, "where": error.where, "way_out": error.way_out}
        return JSONResponse(body, 400 if isinstance(error, InputError) else 503)

    @app.exception_handler(RequestValidationError)
    async def no_act(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"what": "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())}, 400)

    @app.get("/")
    def shown() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        return HTMLResponse(page.replace(_NONCE, nonce), headers=headers)

    @app.get("/state")
    def state() -> Json:
        return board.state()

    @app.post("/acts")
    def act(asked: _Asked) -> Json:
        return {"told": [f"{act.trial}: {act.told}" for act in board.act(asked)]}

    return app


def steer(params: Params, studies: list[str], root: Path, port: int) -> None:
    """Serve the page until interrupted.

    Args:
        params: the project's.
        studies: whose trials it shows, beside those that were made by hand.
        root: the project's folder.
        port: to listen at; 0: a free one.

    Raises:
        InputError: the port is in use; or as `Board`.
    """
    board, token = Board(params, studies, root), secrets.token_urlsafe(24)
    with machine.listening(HOST, port) as listening:
        say(f"steer at http://{HOST}:{listening.getsockname()[1]}/#{token} (Ctrl-C ends the page, and no trial)")
        machine.answer(application(board, token), listening, grace=1)
