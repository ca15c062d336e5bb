"""A worker works in the project's folder, wherever its node's Ray was started."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.pool.cluster import work_in
from pipeline.pool.tuner import cluster

ROOT = Path(__file__).resolve().parents[2]


@ray.remote(num_cpus=0)
def worked_in(home: str) -> str:
    work_in(home)
    return str(Path.cwd())


def test_it_goes_there_and_a_node_without_the_folder_is_named(tmp_path, monkeypatch):
    sweep = load(ROOT / "params.yaml").sweep
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # where this cluster starts
    with cluster(sweep):
        assert ray.get(worked_in.remote(str(tmp_path))) == str(tmp_path)
        with pytest.raises(InputError, match=f"node .*{tmp_path}/gone is not there"):
            ray.get(worked_in.remote(str(tmp_path / "gone")))
