from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.core import machine
from pipeline.core.errors import InputError
from tests.conftest import ROOT
from tests.support import odd_paths


def ask(code: str, python: Path | str, **environment: str) -> list[str]:
    """Run code under a Python of some path; return what it says."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ODD = [name for name in odd_paths.NAMES if not machine.is_plain(name)]


@pytest.fixture
def short():
    """A folder that Ray's can lie in: pytest's own has too long a path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder


@pytest.mark.parametrize("name", [*ODD, 'a"b$HOME`;&|\\'])
def test_a_program_goes_on_under_a_plain_path(tmp_path, short, name):
    environment = tmp_path / name
    environment.symlink_to(sys.prefix, target_is_directory=True)
    code = """
from pipeline.core import machine
machine.go_on_plainly()
import sys, yaml
print(sys.executable, sys.prefix, yaml.__file__, machine.python(), sep="\\n")
"""
    program, prefix, package, again = ask(code, environment / "bin" / Path(sys.executable).name, RAY_TMPDIR=short)
    assert again == program
    assert all(machine.is_plain(path) for path in (program, prefix, package))
    assert Path(prefix).readlink() == environment
    folder = Path(short) / f"hificl-{os.getuid()}"
    assert Path(prefix).parent == folder and folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_whose_name_is_no_text_is_said_at_once(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve"))
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor"], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path}/na\\xefve: the folder's path is no text in UTF-8, which DVC and MLflow keep paths in. "
        "Rename the folder\n"
    )


def test_an_environment_of_a_plain_path_is_called_by_it():
    assert machine.python() == sys.executable


def test_a_link_is_not_put_where_somebody_else_may_put_one(monkeypatch, short):
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.setattr(sys, "executable", "/some where/bin/python")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    with pytest.raises(InputError, match="hificl-4000000000: is not a folder of yours alone"):
        machine.python()


LONG = "/tmp/" + "x" * machine.MOST


@pytest.mark.parametrize("temporary", [LONG, "/tmp/a job", "relative", "/not there"])
def test_rays_folder_is_the_first_that_fits(monkeypatch, temporary):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", temporary)
    assert machine.ray_folder() == Path("/tmp")
    monkeypatch.setattr(machine, "SYSTEM", ("/no",))
    said = f"^TMPDIR: no folder for Ray: {temporary} .*; /no cannot be written. Set RAY_TMPDIR"
    with pytest.raises(InputError, match=said):
        machine.ray_folder()


@pytest.mark.parametrize(
    ("named", "why"), [(LONG, "too long for Ray's sockets .*at most 39"), ("/tmp/a b", "no absolute path of letters")]
)
def test_a_folder_that_was_named_is_not_passed_over(monkeypatch, named, why):
    monkeypatch.setenv("RAY_TMPDIR", named)
    with pytest.raises(InputError, match=f"^RAY_TMPDIR: no folder for Ray: {named} is {why}"):
        machine.ray_folder()


def test_the_longest_folder_that_is_allowed_holds_rays_sockets(tmp_path):
    """Ray's own check of its sockets' paths, on the longest name that its folder can have."""
    from ray._private.utils import validate_socket_filepath

    socket = "x" * machine.MOST + machine._SOCKET
    validate_socket_filepath(socket)
    with pytest.raises(OSError, match="107"):
        validate_socket_filepath("x" + socket)
