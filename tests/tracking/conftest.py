"""A tracker on a real SQLite store, and what its tests ask of the store."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.client import Tracker
from pipeline.tracking.records import KILLED, MetricPoint, RunInput, TrialRunStart

DATA = [RunInput(name="manifest", source="data/manifest.json", digest="d" * 64, context="train")]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tables exist: they take seconds to create."""
    root = tmp_path_factory.mktemp("empty")
    Tracker(f"sqlite:///{root / 'mlflow.db'}", root).prepare([])
    return root / "mlflow.db"


@pytest.fixture
def root(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return checkout(tmp_path, empty_store)


def checkout(folder: Path, empty_store: Path) -> Path:
    """Make a folder with a commit and a copy of the empty store."""
    with closing(sqlite3.connect(empty_store)) as source, closing(sqlite3.connect(folder / "mlflow.db")) as copy:
        source.backup(copy)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / ".gitignore").write_text("ml*\n")
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first"], cwd=folder, check=True
    )
    return folder


@pytest.fixture
def tracker(root: Path) -> Iterator[Tracker]:
    made = Tracker(None, root)
    made.prepare(["study"])
    yield made
    made.close_all(KILLED)


def open_both(tracker: Tracker, key: str = "abc", **params: Any) -> tuple[str, str]:
    parent = tracker.open_sweep("study", tags={"sweep_key": "s1", "profile": "mini"}, description="a sweep")
    trial = TrialRunStart(key, "hificl vqa", params={"rank": 8, **params}, inputs=DATA, tags={"profile": "mini"})
    return parent, tracker.open_trial("study", parent, trial)


def points(*rows: dict[str, float]) -> list[MetricPoint]:
    """What epochs have measured, as points."""
    return [MetricPoint(name, int(row["epoch"]), row[name]) for row in rows for name in row if name != "epoch"]


def ask(root: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"{(root / 'mlflow.db').as_uri()}?mode=ro", uri=True)) as store:
        return store.execute(query).fetchall()


def statuses(root: Path) -> dict[str, str]:
    return dict(ask(root, "select run_uuid, status from runs"))
