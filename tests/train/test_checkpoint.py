import errno
import os
import resource
from pathlib import Path

import pytest

from pipeline.core.errors import InputError, WorkError
from pipeline.core.files import folder_digest
from pipeline.records.trial import Best, CheckpointState
from pipeline.train import checkpoint


def write(text):
    return lambda folder: (folder / "weights").write_text(text)


def test_the_newest_is_found_and_one_generation_is_kept_back(tmp_path):
    for epoch in (1, 2, 3):
        checkpoint.save(tmp_path, CheckpointState(epoch=epoch, peak=epoch), write(f"w{epoch}"))
    path, state = checkpoint.newest(tmp_path)
    assert state.epoch == state.peak == 3 and list(state.files) == ["weights"]
    assert (path / "weights").read_text() == "w3"
    assert checkpoint.epochs(tmp_path) == [2, 3]


@pytest.mark.parametrize("damage", ["flip", "truncate", "state", "field", "digit", "missing"])
def test_a_damaged_one_is_dropped_for_the_one_before(tmp_path, damage):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, CheckpointState(epoch=epoch), write("x" * 100))
    broken = tmp_path / "epoch-0002"
    if damage == "flip":
        (broken / "weights").write_text("y" + "x" * 99)
    elif damage == "truncate":
        (broken / "weights").write_text("x" * 50)
    elif damage == "field":
        state = (broken / "state.json").read_text()
        (broken / "state.json").write_text(state.replace('"peak"', '"pique"'))
    elif damage == "digit":
        state = (broken / "state.json").read_text()
        (broken / "state.json").write_text(state.replace('"packed": 1', '"packed": 3'))
    elif damage == "state":
        (broken / "state.json").write_text("{")
    else:
        (broken / "weights").unlink()
    path, state = checkpoint.newest(tmp_path)
    assert state.epoch == 1 and (path / "weights").read_text() == "x" * 100


def test_a_full_disk_says_what_to_do_and_leaves_the_old_one(tmp_path):
    checkpoint.save(tmp_path, CheckpointState(epoch=1), write("good"))

    def full(folder):
        (folder / "weights").write_text("half")
        Path("/dev/full").write_text("the other half")  # the kernel's own full disk

    with pytest.raises(WorkError, match=r"epoch-0002.*No space left.*Finished trials are kept"):
        checkpoint.save(tmp_path, CheckpointState(epoch=2), full)
    assert checkpoint.newest(tmp_path)[1].epoch == 1
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-0001"]


def test_nothing_there_is_nothing(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None


def test_one_of_newer_code_stays(tmp_path):
    checkpoint.save(tmp_path, CheckpointState(epoch=1), write("good"))
    state = tmp_path / "epoch-0001/state.json"
    state.write_text(state.read_text().replace('"schema": 3', '"schema": 4'))
    with pytest.raises(InputError, match=r"state.json: schema 4 was written by newer code"):
        checkpoint.newest(tmp_path)
    assert state.exists()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_error_of_the_system_is_passed_on_and_removes_nothing(tmp_path, monkeypatch, error):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, CheckpointState(epoch=epoch), write("x"))

    def fails(path):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched, pytest.raises(WorkError, match=f"cannot be read: {os.strerror(error)}"):
        patched.setattr(checkpoint, "file_digest", fails)
        checkpoint.newest(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(WorkError, match="state.json: cannot be read"):
        patched.setattr(Path, "read_bytes", fails)
        checkpoint.newest(tmp_path)
    assert checkpoint.epochs(tmp_path) == [1, 2] and checkpoint.newest(tmp_path)[1].epoch == 2


def test_too_many_open_files_lose_no_checkpoint(tmp_path):
    """The same at the kernel's own limit."""
    for epoch in (1, 2):
        checkpoint.save(tmp_path, CheckpointState(epoch=epoch), write("x"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = os.open(tmp_path, os.O_RDONLY)
    os.close(opened)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened, hard))  # the lowest free one is past the end
    try:
        with pytest.raises(WorkError, match="Too many open files"):
            checkpoint.newest(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert checkpoint.epochs(tmp_path) == [1, 2]


def test_the_state_names_the_adapter_and_refuses_another(tmp_path):
    def with_adapter(text):
        def filled(folder):
            (folder / "adapter").mkdir()
            (folder / "adapter/weights").write_text(text)

        return filled

    best = Best(epoch=1, objective=0.5)
    kept = checkpoint.save(tmp_path, CheckpointState(epoch=1, best=best), with_adapter("w")).best
    assert kept.adapter_digest == folder_digest(tmp_path / "epoch-0001/adapter")
    with pytest.raises(WorkError, match="the adapter of epoch 1 is damaged"):
        checkpoint.save(tmp_path, CheckpointState(epoch=2, best=kept), with_adapter("v"))
    assert checkpoint.epochs(tmp_path) == [1]
