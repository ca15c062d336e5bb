"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import WorkError
from pipeline.core.files import folder_atomic, folder_digest, write_atomic


@pytest.fixture(params=[0o022, 0o077], ids=["shared", "private"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, umask: int) -> None:
    write_atomic(tmp_path / "report.md", "a")
    with folder_atomic(tmp_path / "adapter") as folder:
        (folder / "weights").touch(mode=0o600)
    assert mode(tmp_path / "report.md") == mode(tmp_path / "adapter/weights") == 0o666 & ~umask
    assert mode(tmp_path / "adapter") == 0o777 & ~umask


def test_what_fails_leaves_the_old_and_nothing_beside_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "old")
    with folder_atomic(tmp_path / "folder") as folder:
        (folder / "part").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "file", "\ud800")
    with pytest.raises(WorkError, match="No space left"), folder_atomic(tmp_path / "folder") as folder:
        (folder / "part").write_text("new")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/part").read_text() == "old"
    assert names(tmp_path) == ["file", "folder"]


def test_a_folder_that_stands_where_a_file_goes_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(WorkError, match="file: cannot be written"):
        write_atomic(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]


def test_the_newest_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with folder_atomic(tmp_path / "folder") as folder:
            (folder / text).write_text(text)
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["new"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Else an adapter is kept without its digest, or taken for a damaged one."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/y").write_text("2")
    (tmp_path / "a/x").write_text("1")
    assert folder_digest(tmp_path / "a") == hashlib.sha256(b"b/y\x002x\x001").hexdigest()
    assert folder_digest(tmp_path / "none") is folder_digest(tmp_path / "a/x") is None
    scan = os.scandir

    def fails(path: Path | int) -> object:
        if not isinstance(path, int) and path.name == "b":
            raise OSError(number, os.strerror(number))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(OSError, match=os.strerror(number)):
        folder_digest(tmp_path / "a")
    with pytest.raises(WorkError, match=os.strerror(number)), folder_atomic(tmp_path / "c") as folder:
        (folder / "b").mkdir()
    assert names(tmp_path) == ["a"]
