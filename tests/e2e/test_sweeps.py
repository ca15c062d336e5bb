"""What a sweep can be told: searchers, schedulers, ranks, ZeRO. Faults are in tests/faults."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.test_pipeline import query, trials

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = make_project(tmp_path_factory.mktemp("sweeps") / "project")
    made.python("-m", "stages.subsample", "vqav2")
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


def only(project, **row) -> None:
    project.change(lambda raw: raw["studies"]["small"].update(methods={"hificl": {"method": "hificl", **row}}))


def test_two_ranks_with_zero_2_give_the_losses_of_one(project):
    only(project, set={"micro_batch_size": 4, "accumulation": 1, "rank": 2})
    project.python("-m", "stages.train")
    only(project, set={"micro_batch_size": 2, "accumulation": 1, "rank": 2, "world_size": 2, "zero_stage": 2})
    project.python("-m", "stages.train")
    one, two = (next(iter(rows(project, world_size=n).values())) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-4)
        assert b["selection_score"] == pytest.approx(a["selection_score"], abs=1e-9)


def test_trials_share_forward_passes(project):
    """That they lose what they lose alone is in tests/train/test_loop.py; here the pool and Tune let them meet."""
    only(project, search={"rank": [4, 5, 6]}, set={"micro_batch_size": 2, "accumulation": 1, "zero_stage": 0})
    project.python("-m", "pipeline", "sweep", "--set", "sweep.pack=3", "--set", "sweep.slots=1")
    ends = [trials(project)[key] for rank in (4, 5, 6) for key in rows(project, rank=rank)]
    assert len(ends) == 3 and {end["status"] for end in ends} == {"finished"}
    assert max(end["packed"] for end in ends) == 3


def test_random_search_median_stopping_loss_selection_and_offload(project):
    only(
        project, search={"learning_rate": {"loguniform": [0.001, 0.01]}},
        set={"rank": 7, "offload": "cpu", "zero_stage": 1, "selection_metric": "loss", "selection": "test"},
    )  # fmt: skip
    settings = ["sweep.search=random", "sweep.num_samples=3", "sweep.scheduler=median"]
    project.python("-m", "pipeline", "sweep", *(part for s in settings for part in ("--set", s)))
    found = rows(project, rank=7)
    assert len(found) == 3 and {trials(project)[key]["status"] for key in found} <= {"finished", "stopped"}
    assert all(epoch["objective"] == -epoch["selection_loss"] for epochs in found.values() for epoch in epochs)


def test_optuna_under_asha_asks_for_its_points_and_stops_some(project):
    only(
        project, search={"learning_rate": {"loguniform": [0.0001, 0.1]}, "num_virtual_tokens": [2, 3]}, set={"rank": 3}
    )
    settings = ["sweep.search=optuna", "sweep.num_samples=3", "sweep.scheduler=asha", "sweep.reduction_factor=2"]
    project.python("-m", "pipeline", "sweep", *(part for s in settings for part in ("--set", s)))
    found = rows(project, rank=3)
    ends = [trials(project)[key]["status"] for key in found]
    assert len(found) == 3 and set(ends) <= {"finished", "stopped"} and "finished" in ends
    rates = {
        json.loads((project.folder / "runs" / key / "config.json").read_text())["config"]["learning_rate"]
        for key in found
    }
    assert len(rates) == 3 and all(0.0001 <= rate <= 0.1 for rate in rates)
    project.change(lambda raw: raw["sweep"].update(search="optuna", num_samples=3))
    project.python("-m", "stages.evaluate")
    cell = json.loads((project.folder / "evaluations/studies/small.json").read_text())["cells"][0]
    assert cell["status"] == "done" and len(cell["candidates"]) == 3
    assert query(project, "select count(*) from runs where status='RUNNING'") == [(0,)]
