"""`hificl ui` over a project that has run, in a real browser: how it opens, and each view of a study."""

from __future__ import annotations

import pytest

from pipeline.tracking import page as plugin
from pipeline.tracking.page import table_link
from tests.support.chromium import PROGRAM, browser
from tests.support.views import find, mlflow_views, served

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine"),
]
MAX_PICTURE = 200_000  # bytes


def test_a_study_can_be_read_in_mlflow(project, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ids = find(project.folder, "small")
    with served(project.folder) as address, browser(tmp_path / "profile") as page:
        seen = mlflow_views(page, address, ids, tmp_path)
    # sorted by row: the table's order
    rows = [seen["list"].index(row) for row in ("01 zero-shot", "02 icl-2", "03 hificl", "04 mimic")]
    assert rows == sorted(rows)
    assert all(name in seen["runs"] for name in ids.names)  # children, unfolded
    assert "A small study" in seen["run"] and "hificl study small" in seen["run"]
    assert "learning_rate" in seen["compare"] and all(name in seen["compare"] for name in ids.names)
    assert "small.csv" in seen["artifact"]
    assert "trial_key" in seen["model"]
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 9 and all(5_000 < one.stat().st_size < MAX_PICTURE for one in pictures)


@pytest.mark.skipif(not plugin.server_options(), reason="installed before MLflow's page had a plugin: make setup")
def test_a_new_browser_opens_on_the_studies_and_a_study_on_its_runs(project, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ids = find(project.folder, "small")
    with served(project.folder) as address, browser(tmp_path / "profile") as page:
        page.go(address)
        page.wait("Experiments", "A small study")
        page.run("[...document.querySelectorAll('a')].find(one => one.innerText === 'small').click()")
        assert "Traces" in page.wait("Runs", "Model registry", *ids.names)
        assert page.run("location.hash").startswith(f"#/experiments/{ids.experiment}/runs?")
        links = "[...document.querySelectorAll('a')].filter(one => one.innerText === 'as a table').map(one => one.hash)"
        assert page.run(links) == [table_link(ids.experiment)]
