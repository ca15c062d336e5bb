"""A project's folder that was moved: where MLflow's files lie is set anew.

MLflow makes an artifact location absolute when an experiment is made, for its reader may run in any folder, and every
run, logged model and version keeps it too. So a moved `mlartifacts` would be looked for where it was.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PLACES = {
    "experiments": ("artifact_location",), "runs": ("artifact_uri",), "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}  # fmt: skip
_SECONDS = 60  # for other writers


def follow(file: Path, artifacts: str) -> list[str]:
    """Point a store at its files where they are now; return a sentence for each place where they were looked for.

    Nothing is changed while the old folder is there: a copied project reads and writes the first one's files.

    Args:
        file: the SQLite store.
        artifacts: the address of the folder with the experiments' files.
    """
    here, new = _path(artifacts), artifacts.rstrip("/")
    if here is None:
        return []
    with closing(sqlite3.connect(file, timeout=_SECONDS)) as store, store:
        query = "select distinct artifact_location from experiments where artifact_location is not null"
        locations = [row[0].rstrip("/") for row in store.execute(query)]
        old = {location.rpartition("/")[0] for location in locations if _is_elsewhere(location, here)}
        for place in old:
            for table, columns in _PLACES.items():
                for column in columns:
                    change = f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?"  # noqa: S608
                    store.execute(change, (new, len(place) + 1, len(place) + 1, f"{place}/"))
    return [f"MLflow's files are in {here} now, not in {_path(place)}" for place in sorted(old)]


def _is_elsewhere(location: str, here: Path) -> bool:
    place = _path(location)
    return place is not None and place.parent != here and not place.exists() and (here / place.name).is_dir()


def _path(location: str) -> Path | None:
    """Return the folder of a location, None for one that is not of this machine."""
    parts = urlsplit(location)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path) if parts.scheme else location)
