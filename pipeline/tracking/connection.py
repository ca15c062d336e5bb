"""The way to the MLflow store: opened once, searched, and its failures said in the project's own words."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy.exc
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.copies import main_checkout
from pipeline.errors import InputError, WorkError
from pipeline.progress import say
from pipeline.tracking import store
from pipeline.tracking.moved import follow
from pipeline.tracking.provenance import provenance
from pipeline.tracking.showing import experiment_tags

for _name in ("alembic", "mlflow.system_metrics", "mlflow.store.db"):
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a retry is no news: what comes of it is said
_AWAY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}  # as codes of MLflow's


class StoreAway(WorkError):
    """The store does not answer or cannot write; the same call may succeed later."""


class Connection:
    """One MLflow store, opened at its first use.

    Args:
        uri: address of the store; None: MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml of the main checkout.
        root: the project's root.
        artifacts: where new experiments keep their files (a folder, or s3://bucket/path); None: mlartifacts beside
            params.yaml, or what a tracking server chooses.

    Raises:
        InputError: `uri` is of no kind that MLflow can keep runs in.
    """

    def __init__(self, uri: str | None, root: Path | str, artifacts: str | None = None) -> None:
        self.root = Path(root).resolve()
        home = main_checkout(self.root)
        self.uri = store.resolve(uri or os.environ.get("MLFLOW_TRACKING_URI") or None, home)
        if artifacts is None and store.is_database(self.uri):
            artifacts = str(home / "mlartifacts")
        self.artifacts = artifacts and (artifacts if "://" in artifacts else (home / artifacts).resolve().as_uri())
        self._experiments: dict[str, str] = {}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Code version, package versions, machine and data digests, read once."""
        return provenance(self.root)

    @cached_property
    def _client(self) -> MlflowClient:
        with self._talking(InputError), store.creation_lock(self.uri):
            store.probe(self.uri)
            if store.sqlite_file(self.uri) is not None:
                store.tune_sqlite()
            client = MlflowClient(self.uri)
            client.search_experiments(max_results=1)  # the first call creates the tables
            file = store.sqlite_file(self.uri)
            for line in follow(file, self.artifacts) if file and self.artifacts else ():
                say(f"note: {line}")
        return client

    def experiment(self, study: str) -> str:
        """Return the id of a study's experiment, which is made, or brought back from deletion, when needed."""
        if study not in self._experiments:
            client = self._client
            with self._talking(), store.creation_lock(self.uri):
                found = client.get_experiment_by_name(study)
                if found is None:
                    place = f"{self.artifacts.rstrip('/')}/{study}" if self.artifacts else None
                    made = client.create_experiment(study, artifact_location=place)
                else:
                    made = found.experiment_id
                    if found.lifecycle_stage != "active":
                        client.restore_experiment(made)
                self._tag_experiment(made, experiment_tags(found.tags if found else {}))
            self._experiments[study] = made
        return self._experiments[study]

    def _tag_experiment(self, experiment: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_experiment_tag(experiment, key, value)

    def _find(self, study: str, tags: Mapping[str, str]) -> Run | None:
        query = " and ".join(f"tags.`{key}` = '{plain(value)}'" for key, value in tags.items() if value)
        runs = self._search(query, [self.experiment(study)])
        runs = [run for run in runs if all(run.data.tags.get(key, "") == value for key, value in tags.items())]
        return min(runs, key=lambda run: (run.info.start_time, run.info.run_id)) if runs else None

    def _search(self, query: str, experiments: list[str] | None = None) -> list[Run]:
        client = self._client
        with self._talking():
            if experiments is None:
                experiments = [one.experiment_id for one in pages(client.search_experiments)]
            return list(pages(client.search_runs, experiments, query, ViewType.ACTIVE_ONLY))

    def _stored_steps(self, run_id: str) -> set[tuple[str, int]]:
        names = [name for name in self._client.get_run(run_id).data.metrics if not name.startswith("system/")]
        return {(name, one.step) for name in names for one in self._client.get_metric_history(run_id, name)}

    @contextmanager
    def _talking(self, kind: type[InputError] | type[WorkError] = WorkError) -> Iterator[None]:
        """Turn what the store can answer with into the project's own error."""
        try:
            yield
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise  # a file of ours, not the store
            where, cause = store.shown(self.uri), (str(error).strip() or type(error).__name__).splitlines()[0]
            if "out-of-date database schema" in str(error):
                way_out = f"Save a copy, then run: mlflow db upgrade {where}"
                raise InputError(
                    "the store was written by another version of MLflow", where=where, way_out=way_out
                ) from None
            away = not isinstance(error, MlflowException) or error.error_code in _AWAY
            away_kind = StoreAway if kind is WorkError else store.Unreachable
            raise (away_kind if away else kind)(f"the MLflow store failed: {cause}", where=where) from error


def pages(call: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Yield the entries of all pages that a search answers with."""
    token = None
    while True:
        page = call(*arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def plain(value: str) -> str:
    """Return `value` if it can stand in a filter of MLflow, which knows no escaping."""
    if "'" in value:
        raise InputError(f"{value!r} must not hold a quotation mark", where="a run's key")
    return value
