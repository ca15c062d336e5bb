"""The project's own small goldens, made with the official programs on texts written for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden():
    """`golden(name)` reads tests/golden/<name>.json."""
    folder = Path(__file__).resolve().parent.parent / "golden"
    return lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def write(tmp_path):
    """`write(name, value)` writes a file (text as it is, anything else as JSON) and returns its path."""

    def to_file(name, value):
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return str(path)

    return to_file


@pytest.fixture
def score(capsys):
    """`score("vqa", "--results", ..)` runs the command and returns (exit status, JSON or None, standard error)."""
    from tests.support.scoring import main

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, json.loads(output.out) if output.out else None, output.err

    return run
