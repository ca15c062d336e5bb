"""A worker works in the project's folder, wherever its Ray was started, and meets the others of its slot alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import ray

from pipeline.config.load import load
from pipeline.core.errors import InputError, WorkError
from pipeline.pool import slot
from pipeline.pool.cluster import running, unanswered
from tests.support.told_actors import worked_in

ROOT = Path(__file__).resolve().parents[2]


def test_it_goes_there_and_a_node_without_the_folder_is_named(tmp_path, monkeypatch):
    sweep = load(ROOT / "params.yaml").sweep
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # where this cluster starts
    with running(sweep):
        assert ray.get(worked_in.remote(str(tmp_path))) == str(tmp_path)
        with pytest.raises(InputError, match=f"node .*{tmp_path}/gone is not there"):
            ray.get(worked_in.remote(str(tmp_path / "gone")))


def test_a_node_that_raises_has_other_code_and_one_whose_answer_ray_lost_is_asked_again():
    """A node that dies while it is asked refuses no sweep: the next driver asks those that are there then."""
    raised = ray.exceptions.RayTaskError("read", "Traceback\nModuleNotFoundError: no torch", ModuleNotFoundError())
    assert isinstance(error := unanswered("10.0.0.2", raised), InputError)
    assert str(error).startswith("node 10.0.0.2: could not say which code it has (") and "same version" in str(error)
    for lost in (ray.exceptions.TaskUnschedulableError("the node doesn't exist any more"),
                 ray.exceptions.WorkerCrashedError()):  # fmt: skip
        assert isinstance(unanswered("10.0.0.2", lost), WorkError)


def test_ranks_meet_at_the_first_ones_own_address_or_in_a_folder_of_their_owners(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.2")
    worker = slot.Worker.__ray_metadata__.modified_class
    first = worker(0, 2, 0.0)
    meeting = first.meeting(False)
    with first.listener as listener:
        assert listener.getsockname()[0] == "127.0.0.2" and meeting == f"tcp://127.0.0.2:{listener.getsockname()[1]}"
    together = Path(first.meeting(True)).parent
    assert stat.S_IMODE(together.stat().st_mode) == 0o700 and together.owner() == Path.home().owner()
    assert worker(1, 2, 0.0).meeting(False) == worker(0, 1, 0.0).meeting(True) == ""
