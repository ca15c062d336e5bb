"""Where the run store is: its address, a sign of life within seconds, and its files after the folder was moved."""

from __future__ import annotations

import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import sqlalchemy
from mlflow.exceptions import MlflowException
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url

from pipeline.core.errors import InputError, WorkError
from pipeline.core.locks import held
from pipeline.core.progress import say

_AWAY_CODES = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}  # MLflow's


class Unreachable(InputError):
    """Nothing answers at the address."""


class StoreAway(WorkError):
    """The store does not answer or cannot write; the same call may succeed later."""


AWAY = (StoreAway, Unreachable)

SECONDS = 4  # how long an answer may take
_DEFAULT = "Set MLFLOW_TRACKING_URI or params.yaml's tracking.uri, or leave both out for the embedded mlflow.db"
# where MLflow keeps the place of its files: absolute since the experiment was made, for a reader may run in any folder
_LOCATIONS = {
    "experiments": ("artifact_location",), "runs": ("artifact_uri",), "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}  # fmt: skip
_HINT = "(raised as a result of Query-invoked autoflush"  # SQLAlchemy's line before the cause
_LOCK_SECONDS = 60  # for other writers
_CONNECT_TIMEOUT = {"postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}


def resolve_address(uri: str | None, root: Path) -> str:
    """Return the absolute address: SQLite paths are taken from `root`, and None is `root`/mlflow.db.

    Raises:
        InputError: an address of no kind that MLflow can keep runs in.
    """
    if uri is None:
        return sqlite_uri(root / "mlflow.db")
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https", "databricks"):
        return uri.rstrip("/")
    if scheme in ("", "file"):
        raise InputError(
            "MLflow no longer keeps runs in plain files", where=shown(uri), way_out="Write sqlite:///mlflow.db"
        )
    url = _url(uri)
    if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
        return sqlite_uri((root / url.database).resolve())
    return uri


def sqlite_uri(file: Path) -> str:
    """Return the address of an SQLite file.

    As the eye reads it, or, where that would be read as another file (a folder's name holds a percent sign or a
    question mark), escaped and with the driver named.

    Raises:
        InputError: SQLAlchemy has no address for it.
    """
    # With the driver, because MLflow makes the folder of a plain address beforehand, with the escapes in its name.
    for address in (f"sqlite:///{file}", f"sqlite+pysqlite:///{quote(str(file))}"):
        if sqlite_file(address) == file:
            return address
    raise InputError("has no address as an SQLite store", where=str(file), way_out="Rename the folder")


def shown(uri: str) -> str:
    """Return `uri` without its password, for messages."""
    if "@" not in uri:
        return uri
    try:
        return make_url(uri).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return f"{uri.partition('://')[0]}://...@{uri.rpartition('@')[2]}"


def is_database(uri: str) -> bool:
    """Return whether this process itself writes to the database (otherwise a server does)."""
    return urlsplit(uri).scheme not in ("http", "https", "databricks")


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store, None for every other kind."""
    url = make_url(uri) if uri.startswith("sqlite") else None
    return Path(url.database) if url is not None and url.database else None


def require_there(uri: str) -> None:
    """Refuse an SQLite store that is not there: who only looks makes none.

    Raises:
        InputError: it is not.
    """
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise InputError("no MLflow store", where=str(file), way_out="Run `make repro` or `hificl sweep` first")


def probe(uri: str) -> None:
    """Ask the store for a sign of life.

    Raises:
        InputError: no answer within a few seconds; the message names the address, the cause and the way out.
    """
    file = sqlite_file(uri)
    if file is not None:
        _probe_sqlite(file, uri)
    elif uri.startswith(("http://", "https://")):
        _probe_server(uri)
    elif is_database(uri):
        _probe_database(_url(uri))


@contextmanager
def talking(uri: str, kind: type[InputError] | type[WorkError] = WorkError) -> Iterator[None]:
    """Turn what a store can answer with into the project's own error.

    Args:
        uri: its address.
        kind: of the error where the store refuses; one that is away is `Unreachable` for an InputError.

    Raises:
        StoreAway: it does not answer or cannot write.
        Unreachable: likewise, at the first call.
        InputError: another version of MLflow wrote it.
    """
    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise  # a file of ours, not the store
        lines = [line for line in str(error).strip().splitlines() if not line.startswith(_HINT)]
        address, cause = shown(uri), (lines or [type(error).__name__])[0]
        if "out-of-date database schema" in str(error):
            raise InputError(
                "the store was written by another version of MLflow",
                where=address,
                way_out=f"Save a copy, then run: mlflow db upgrade {address}",
            ) from None
        away = not isinstance(error, MlflowException) or error.error_code in _AWAY_CODES
        away_kind = StoreAway if kind is WorkError else Unreachable
        raise (away_kind if away else kind)(f"the MLflow store failed: {cause}", where=address) from error


@contextmanager
def creation_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create the tables of a SQLite file: several at once fail on a new one.

    One that is killed meanwhile leaves a file that MLflow never opens again; the next one begins anew.

    Raises:
        Unreachable: the folder cannot be written, or another process holds the lock for too long; the message names it.
    """
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    with ExitStack() as stack:
        try:
            lock, waits = file.with_name(f"{file.name}.lock"), f"waiting {_LOCK_SECONDS} s at most for {file}, held by "
            stack.enter_context(
                held(lock, "the opening of a store", wait=_LOCK_SECONDS, waits=lambda by: say(waits + by))
            )
        except WorkError as error:
            raise _unreachable(uri, error, f"Make {file.parent} a folder that can be written. {_DEFAULT}") from None
        except InputError as error:
            raise _unreachable(uri, f"{error.where} is {error.what}", f"{error.way_out}") from None
        if is_half_made(file):
            for part in ("", "-wal", "-shm", "-journal"):
                file.with_name(f"{file.name}{part}").unlink(missing_ok=True)
        is_new = not file.exists()
        if is_new:
            _making(file).touch()
        yield
        if is_new:
            _making(file).unlink(missing_ok=True)


def is_half_made(file: Path) -> bool:
    """Whether a process was killed while it created the tables of a SQLite file; one that holds a run is whole."""
    if not (_making(file).exists() and file.exists()):
        return False
    try:
        with closing(sqlite3.connect(file)) as connection:
            return connection.execute("select 1 from runs").fetchone() is None
    except sqlite3.Error as error:
        return "no such table" in str(error)


def _making(file: Path) -> Path:
    """Return what lies beside a SQLite file while its tables are created."""
    return file.with_name(f"{file.name}.making")


def tune_sqlite() -> None:
    """Make every further SQLite connection wait for other writers and flush at checkpoints only.

    With the write-ahead log a power cut can lose the last commits but not break the file, and the trial's own
    ledger, not MLflow, is what a resume reads.
    """
    if not event.contains(sqlalchemy.engine.Engine, "connect", _on_connect):
        event.listen(sqlalchemy.engine.Engine, "connect", _on_connect)


def checkpoint(uri: str) -> None:
    """Write the log of an SQLite store back into its one file, as far as other writers let it."""
    file = sqlite_file(uri)
    if file is not None and file.is_file():
        with closing(sqlite3.connect(file, timeout=SECONDS)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def follow_moved(file: Path, artifacts: str) -> list[str]:
    """Point a store at its files after the project's folder was moved; return a sentence for each place of before.

    Nothing is changed while the old folder is there: a copied project reads and writes the first one's files.
    """
    here, new = _local(artifacts), artifacts.rstrip("/")
    if here is None:
        return []
    with closing(sqlite3.connect(file, timeout=_LOCK_SECONDS)) as store, store:
        query = "select distinct artifact_location from experiments where artifact_location is not null"
        locations = [row[0].rstrip("/") for row in store.execute(query)]
        old = {location.rpartition("/")[0] for location in locations if _is_elsewhere(location, here)}
        for place in old:
            for table, columns in _LOCATIONS.items():
                for column in columns:
                    change = f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?"  # noqa: S608
                    store.execute(change, (new, len(place) + 1, len(place) + 1, f"{place}/"))
    return [f"MLflow's files are in {here} now, not in {_local(place)}" for place in sorted(old)]


def _on_connect(connection: object, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA busy_timeout = 60000")
        connection.execute("PRAGMA synchronous = NORMAL")


def _probe_sqlite(file: Path, uri: str) -> None:
    try:
        with closing(sqlite3.connect(file, timeout=SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            connection.execute(f"PRAGMA user_version = {int(version)}")  # a write that changes nothing
    except sqlite3.Error as error:
        if "locked" in str(error):
            return  # somebody writes to it this moment: it lives
        way_out = f"Make {file} writable, or move it away to start a new store. {_DEFAULT}"
        raise _unreachable(uri, error, way_out) from None


def _probe_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=SECONDS):  # noqa: S310 - scheme checked by the caller
            pass
    except urllib.error.HTTPError:
        pass  # somebody answers; whether it lets us in is seen at the first call
    except (OSError, ValueError) as error:
        way_out = f"Start the server (mlflow server --host ... --port ...) or correct the address. {_DEFAULT}"
        raise _unreachable(uri, getattr(error, "reason", None) or error, way_out) from None


def _probe_database(url: URL) -> None:
    option = _CONNECT_TIMEOUT.get(url.get_backend_name())
    try:
        engine = sqlalchemy.create_engine(url, connect_args={option: SECONDS} if option else {})
        with closing(engine.connect()):
            pass
        engine.dispose()
    except ModuleNotFoundError as error:
        way_out = f"Install the driver that {url.drivername} names"
        raise _unreachable(url.render_as_string(hide_password=True), error, way_out) from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        way_out = f"Start the database, or correct host, port, user and password. {_DEFAULT}"
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise _unreachable(url.render_as_string(hide_password=True), cause, way_out) from None


def _unreachable(uri: str, cause: object, way_out: str) -> Unreachable:
    return Unreachable(f"the MLflow store cannot be reached: {cause}", where=shown(uri), way_out=way_out)


def _url(uri: str) -> URL:
    try:
        return make_url(uri)
    except sqlalchemy.exc.ArgumentError:
        raise InputError("not an address of an MLflow store", where=shown(uri), way_out=_DEFAULT) from None


def _is_elsewhere(location: str, here: Path) -> bool:
    place = _local(location)
    return place is not None and place.parent != here and not place.exists() and (here / place.name).is_dir()


def _local(location: str) -> Path | None:
    """Return the folder of a location, None for one that is not of this machine."""
    parts = urlsplit(location)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path) if parts.scheme else location)
