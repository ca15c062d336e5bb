from pathlib import Path

import pytest

from pipeline.core.errors import InputError, WorkError
from pipeline.records.trial import CheckpointState
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


@pytest.mark.parametrize("damage", ["flip", "truncate", "state", "field", "missing"])
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
    state.write_text(state.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(InputError, match=r"state.json: schema 2 was written by newer code"):
        checkpoint.newest(tmp_path)
    assert state.exists()
