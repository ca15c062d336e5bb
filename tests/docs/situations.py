"""Situations in which docs/faq.md shows an error: each spoils a project for the length of a block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pipeline.config.load import FOLDERS
from tests.e2e.conftest import change

SITUATIONS: dict[str, Callable[[Path], AbstractContextManager[None]]] = {}


def situation(made: Callable[[Path], Iterator[None]]) -> Callable[[Path], Iterator[None]]:
    """File a situation under its name, with - for _."""
    SITUATIONS[made.__name__.replace("_", "-")] = contextmanager(made)
    return made


@contextmanager
def moved(path: Path) -> Iterator[None]:
    """Take a file or folder away."""
    kept = path.with_name(f"{path.name}.kept")
    path.rename(kept)
    try:
        yield
    finally:
        kept.rename(path)


@contextmanager
def changed(path: Path, before: str, after: str) -> Iterator[None]:
    """Change a text file."""
    text = path.read_text(encoding="utf-8")
    assert before in text, (path, before)
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


@situation
def a_project(folder: Path) -> Iterator[None]:
    yield


@situation
def a_long_ray_folder(folder: Path) -> Iterator[None]:
    os.environ["RAY_TMPDIR"] = "/tmp/slurm_jobdir_1355700/tmp.t0016/user/scratch"
    try:
        yield
    finally:
        del os.environ["RAY_TMPDIR"]


@situation
def no_manifest(folder: Path) -> Iterator[None]:
    with moved(folder / "data/manifests/vqav2/manifest.json"):
        yield


@situation
def no_data(folder: Path) -> Iterator[None]:
    with moved(folder / "data/real"):
        (folder / "data/real").mkdir()
        try:
            yield
        finally:
            (folder / "data/real").rmdir()


@situation
def no_weights(folder: Path) -> Iterator[None]:
    with _params(
        folder,
        lambda raw: raw["profiles"]["tiny"].update(
            sources={"idefics2-8b-base": {"weights": "weights/idefics2-8b-base"}}
        ),
    ):
        yield


@situation
def a_sweep_is_running(folder: Path) -> Iterator[None]:
    holder = (
        "import sys, pathlib; from pipeline.records.store import TrialStore\n"
        "with TrialStore(pathlib.Path('runs')).lock('a sweep'): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holder], cwd=folder, text=True, **pipes) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            assert process.stdin
            process.stdin.close()


@situation
def a_spoiled_adapter(folder: Path) -> Iterator[None]:
    study = json.loads((folder / "evaluations/studies/small.json").read_text())
    key = next(cell["trial"] for cell in study["cells"] if cell["row"] == "hificl")
    file = folder / "runs" / key / "adapter/adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        yield
    finally:
        file.write_bytes(content)


@situation
def other_data(folder: Path) -> Iterator[None]:
    with changed(folder / "data/manifests/vqav2/manifest.json", '"seed": 0', '"seed": 1'):
        yield


@situation
def no_reports(folder: Path) -> Iterator[None]:
    with moved(folder / "evaluations"):
        yield


@situation
def no_store(folder: Path) -> Iterator[None]:
    with moved(folder / "mlflow.db"):
        yield


@contextmanager
def _params(folder: Path, edit: Callable[[dict], None]) -> Iterator[None]:
    files = [folder / "params.yaml", *(path for kind in FOLDERS for path in (folder / kind).glob("*.yaml"))]
    before = {path: path.read_text(encoding="utf-8") for path in files}
    change(folder, edit)
    try:
        yield
    finally:
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")
