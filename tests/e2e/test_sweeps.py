"""What a sweep can be told: searchers, schedulers, ranks, ZeRO. Faults are in tests/faults."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.test_pipeline import query, trials

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = make_project(tmp_path_factory.mktemp("sweeps") / "project", slots=1)
    made.draw("vqav2")
    return made


def rows(project, **wanted) -> dict[str, list[dict]]:
    """Epochs of the trials whose configuration has the values `wanted`."""
    found = {}
    for path in (project.folder / "runs").glob("*/config.json"):
        config = json.loads(path.read_text())["config"]
        if config["epochs"] and all({**config, **config["options"]}.get(k) == v for k, v in wanted.items()):
            lines = (
                (path.parent / "metrics.jsonl").read_text().splitlines()
                if (path.parent / "metrics.jsonl").exists()
                else []
            )
            found[path.parent.name] = [json.loads(line) for line in lines]
    return found


def only(project, *rows) -> None:
    methods = {f"hificl-{number}": {"method": "hificl", **row} for number, row in enumerate(rows)}
    project.change(lambda raw: raw["studies"]["small"].update(methods=methods))


def test_two_ranks_with_zero_2_give_the_losses_of_one(project):
    step = {"accumulation": 1, "rank": 2}
    ranks = {"micro_batch_size": 2, "world_size": 2, "zero_stage": 2}
    only(project, {"set": {**step, "micro_batch_size": 4}}, {"set": {**step, **ranks}})
    project.python("-m", "stages.train")
    one, two = (next(iter(rows(project, world_size=n).values())) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-4)
        assert b["selection_score"] == pytest.approx(a["selection_score"], abs=1e-9)


@pytest.mark.long
def test_trials_share_forward_passes(project):
    """That they lose what they lose alone is in tests/train/test_loop.py; here the pool and Tune let them meet."""
    step = {"micro_batch_size": 2, "accumulation": 1, "zero_stage": 0}
    only(project, {"search": {"rank": [4, 5, 6]}, "set": step})
    project.python("-m", "pipeline", "sweep", "--set", "sweep.pack=3", "--set", "sweep.slots=1")
    ends = [trials(project)[key] for rank in (4, 5, 6) for key in rows(project, rank=rank)]
    assert len(ends) == 3 and {end["status"] for end in ends} == {"finished"}
    assert max(end["packed"] for end in ends) == 3 and all(end["exact"] for end in ends)


def test_a_search_whose_worse_half_leaves_within_the_first_epoch_says_so_everywhere(project):
    alone = {"micro_batch_size": 1, "accumulation": 1}
    only(project, {"search": {"learning_rate": [1e-9, 0.01, 0.02, 1e-12]}, "set": {"rank": 9, **alone}})
    project.python("-m", "pipeline", "sweep", "--set", "sweep.early_exit.after=[0.5]")
    ended = trials(project)
    ends = {lr: ended[next(iter(rows(project, rank=9, learning_rate=lr)))] for lr in (1e-9, 0.01, 0.02, 1e-12)}
    assert [ends[lr]["status"] for lr in (0.01, 0.02)] == ["finished"] * 2
    for rate in (1e-9, 1e-12):
        assert (ends[rate]["status"], ends[rate]["epochs"]) == ("stopped", 0)
        assert re.match(r"left the search after 0.5 epochs: a loss of \S+, number [34] of 4$", ends[rate]["error"])
    project.python("-m", "stages.evaluate")  # chooses among those that stayed
    told = "select count(*) from tags where key='left_search' and value like 'left the search after 0.5 epochs%'"
    assert query(project, told) == [(2,)]


def test_asha_stops_a_trial_that_learns_nothing_by_its_loss_on_the_test_split(project):
    """Whom a scheduler stops is in tests/pool/test_schedule.py; here its word ends a training, in DVC's ledger too."""
    given = {"rank": 7, "offload": "cpu", "zero_stage": 1, "selection_metric": "loss", "selection": "test"}
    only(project, {"search": {"learning_rate": [0.01, 1e-12]}, "set": given})
    settings = ["sweep.scheduler=asha", "sweep.grace_epochs=1", "sweep.reduction_factor=2", "sweep.slots=1"]
    project.python("-m", "pipeline", "sweep", *(part for s in settings for part in ("--set", s)))
    (learns, kept), (idle, cut) = (next(iter(rows(project, rank=7, learning_rate=lr).items())) for lr in (0.01, 1e-12))
    assert kept[0]["selection_loss"] < cut[0]["selection_loss"]
    ends = {key: (end["status"], end["epochs"]) for key, end in trials(project).items() if key in (learns, idle)}
    assert ends == {learns: ("finished", 2), idle: ("stopped", 1)}
    assert all(epoch["objective"] == -epoch["selection_loss"] for epoch in (*kept, *cut))
    assert query(project, "select count(*) from runs where status='RUNNING'") == [(0,)]
