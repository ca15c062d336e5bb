"""Pictures of the MLflow page and of the report over a project: `make pictures`.

`python -m tests.support.views PROJECT FOLDER` takes them.
The test of `hificl ui` goes through the same views of the tiny project, and keeps its pictures to itself.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.tracking.page import table_link
from tests.support.chromium import SECONDS, Page, browser
from tests.support.free_port import free_port

# what `hificl ui` sets in a new browser, where the plugin of its page is installed
SETTINGS = """localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"')"""


@dataclass(frozen=True)
class Ids:
    """What is looked at: a study's newest sweep, two of its trials, and one that is a registered model."""

    study: str
    experiment: str
    parent: str
    trials: list[str]
    names: list[str]
    model: str


def find(project: Path, study: str) -> Ids:
    """Read the ids from a project's store."""
    with closing(sqlite3.connect(f"file:{project / 'mlflow.db'}?mode=ro", uri=True)) as store:
        experiment, parent = store.execute(
            "select r.experiment_id, r.run_uuid from runs r join tags k on k.run_uuid = r.run_uuid and k.key = 'kind' "
            "and k.value = 'sweep' join tags s on s.run_uuid = r.run_uuid and s.key = 'study' and s.value = ? "
            "join tags d on d.run_uuid = r.run_uuid and d.key = 'report_digest' order by r.start_time desc",
            (study,),
        ).fetchone()
        trials = store.execute(
            "select r.run_uuid, r.name from runs r join tags t on t.run_uuid = r.run_uuid and t.key = 'table.row' "
            "join tags a on a.run_uuid = r.run_uuid and a.key = 'adapter_model_id' where r.experiment_id = ? "
            "order by r.start_time desc, t.value desc limit 2",
            (experiment,),
        ).fetchall()
        assert len(trials) == 2, "two trained trials of the study, in its report"
        (model,) = store.execute("select name from registered_models order by name").fetchone()
    return Ids(study, str(experiment), parent, [run for run, _ in trials], [name for _, name in trials], model)


@contextmanager
def served(project: Path) -> Iterator[str]:
    """Give the address of `hificl ui` over a project, which is ended with the block."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "ui", "--port", str(port)], cwd=project, start_new_session=True,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 3 * SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    log.seek(0)
                    assert process.poll() is None and time.monotonic() < deadline, log.read()[-3000:]
                    time.sleep(0.2)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def mlflow_views(page: Page, address: str, ids: Ids, out: Path, settle: float = 0.0) -> dict[str, str]:
    """Go through the views of a study, from its runs to one answer; return what is written on each."""
    runs = f"{address}/#/experiments/{ids.experiment}/runs"
    files = f"{runs}/{ids.parent}/artifacts/report"
    two = f"?runs={json.dumps(ids.trials)}&experiments={json.dumps([ids.experiment])}".replace(" ", "")
    views = {
        "runs": (f"{address}/#/experiments/{ids.experiment}", [*ids.names, "as a table"]),
        "list": (f"{address}/{table_link(ids.experiment)}", [*ids.names, "table.row", "table_value"]),
        "trial": (f"{runs}/{ids.trials[0]}", ["trained on", "hificl reproduce", "step/train_loss"]),
        "curve": (f"{runs}/{ids.trials[0]}/model-metrics", ["step", "(1)", "train_loss"]),
        "answers": (f"{runs}/{ids.trials[0]}/artifacts/answers.json", ["View as table", "references", "question"]),
        "run": (f"{runs}/{ids.parent}", ["trials, profile", "Tables and figures"]),
        "compare": (f"{address}/#/compare-runs{two}", ["Comparing 2 Runs", "table_value"]),
        "artifact": (
            f"{files}/{ids.study}.md",
            [f"{ids.study}.html", "split was scored once"],
        ),
        "model": (f"{address}/#/models/{ids.model}", [ids.model, "best"]),
    }
    seen = {}
    page.go(address)
    page.wait("Experiments")
    page.run(SETTINGS)
    for name, (where, words) in views.items():
        page.go("about:blank")
        page.go(where)
        seen[name] = page.wait(*words)
        time.sleep(settle)
        page.picture(out / f"mlflow-{name}.png")
    return seen


def report_view(page: Page, project: Path, out: Path) -> None:
    """Take the top of the report, and say how long it took to open."""
    page.go((project / "reports/index.html").resolve().as_uri())
    page.wait("Numbers are means over seeds")
    spent = page.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"report: opened in {spent:.0f} ms, {(project / 'reports/index.html').stat().st_size / 1000:.0f} kB")
    page.picture(out / "report.png")


def main(project: Path, out: Path, study: str) -> None:
    with tempfile.TemporaryDirectory() as profile, served(project) as address, browser(Path(profile)) as page:
        mlflow_views(page, address, find(project, study), out, settle=3.0)
        report_view(page, project, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "hificl-table1")
