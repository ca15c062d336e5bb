"""The page on which a sweep is steered: a real server, asked by a program and, where one is installed, by a browser."""

from __future__ import annotations

import multiprocessing
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from pipeline.config.load import Study, StudyMethod
from pipeline.core.errors import InputError
from pipeline.records.store import TrialStore
from pipeline.sweep import recorded
from pipeline.sweep.steering import Board, steer
from tests.support.chromium import PROGRAM, browser
from tests.support.free_port import free_port
from tests.sweep.conftest import worked

TOKEN = "the-token-of-this-test"


@pytest.fixture
def params(plan, small_world, tmp_path) -> Any:
    """Parameters whose one study is the plan's two trials; the first is trained, the second open."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifests").symlink_to(small_world)
    rows = {f"row{config.seed}": StudyMethod(method=config.method, trial=config) for config in plan.trials.values()}
    study = Study(title="Steered", methods=rows, seeds=[0], backbones=["idefics2-8b-base"], tasks=["vqav2"])
    run = plan.params.run.model_copy(update={"backbones": ["mini-idefics2"], "tasks": ["mini-vqa"]})
    for config in plan.trials.values():
        store(tmp_path).open(config)
    recorded.stop(store(tmp_path), list(plan.trials)[1])
    worked(plan)
    recorded.resume(store(tmp_path), list(plan.trials)[1])
    return plan.params.model_copy(update={"studies": {"steered": study}, "run": run})


def store(root: Path) -> TrialStore:
    return TrialStore(root / "runs")


@pytest.fixture
def address(params, tmp_path, monkeypatch) -> Iterator[str]:
    """Where a real server answers, in a process of its own."""
    monkeypatch.setattr(secrets, "token_urlsafe", lambda size: TOKEN)
    port = free_port()
    server = multiprocessing.get_context("fork").Process(target=steer, args=(params, ["steered"], tmp_path, port))
    server.start()
    until = time.monotonic() + 60
    while not (heard := listens(server.pid)):
        assert server.is_alive() and time.monotonic() < until
        time.sleep(0.1)
    assert heard == {("127.0.0.1", port)}
    yield f"http://127.0.0.1:{port}"
    psutil.Process(server.pid).send_signal(signal.SIGINT)
    server.join(30)
    assert server.exitcode is not None


def listens(pid: int | None) -> set[tuple[str, int]]:
    found = psutil.Process(pid).net_connections("inet")
    return {tuple(connection.laddr) for connection in found if connection.status == psutil.CONN_LISTEN}


def asked(address: str, path: str, body: Any = None, *, token: str = TOKEN, **headers: str) -> requests.Response:
    headers |= {"Authorization": f"Bearer {token}"}
    return requests.request("POST" if body else "GET", f"{address}/{path}", json=body, headers=headers, timeout=60)


def test_the_steering_page_listens_on_loopback_and_does_nothing_without_its_token(address, tmp_path):
    page = requests.get(address, timeout=60)
    assert page.status_code == 200 and "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "steered" not in page.text and TOKEN not in page.text.replace(f'nonce="{TOKEN}"', "")
    key, body = sorted(store(tmp_path).all_keys())[0], {"act": "stop", "trial": "0000"}
    for path, sent in (("state", None), ("acts", body), ("acts", {**body, "trial": key}), ("docs", None)):
        for token in ("", "another", TOKEN[:-1]):
            assert asked(address, path, sent, token=token).status_code == 401
    assert asked(address, "state", Host="rebound.example").status_code == 400
    assert len(store(tmp_path).acts()) == 2  # as before


def test_what_the_page_shows_and_does_is_what_the_command_line_does(address, params, tmp_path):
    rows = asked(address, "state").json()["rows"]
    trained, waiting = ({row["state"]: row for row in rows}[state] for state in ("finished", "waiting"))
    assert trained["epochs"] == "2/2" and len(trained["losses"]) == 4 and trained["may"] == ["clone", "extend"]
    assert waiting["may"] == ["stop", "clone"] and waiting["by_hand"] == "stopped; may go on"

    def told(**body: Any) -> str:
        answer = asked(address, "acts", body)
        return "; ".join(answer.json()["told"]) if answer.ok else f"{answer.status_code} {answer.json()['what']}"

    assert told(act="stop", trial=waiting["key"], after=1) == f"{waiting['key']}: stopped after epoch 1"
    assert told(act="stop", trial=trained["key"]) == "400 has ended: finished"
    assert told(act="stop", trial="../../etc") == "400 no such trial"
    assert told(act="clone", trial=trained["key"], changes={"rank": "3, 4"}).count(": a clone of") == 2
    assert told(act="clone", trial=trained["key"], changes={"rank": "2, 3, 4"}) == "400 all 3 of them are there"
    assert told(act="clone", trial=trained["key"], changes={"rnak": "3"}) == "400 no setting 'rnak' to change"
    assert told(act="clone", trial=trained["key"], changes={"rank": ""}) == "400 no value"
    assert told(act="extend", trial=trained["key"], epochs=3).endswith("trained on, with epochs 3")
    assert told(act="remove", trial=trained["key"]).startswith("400 act: ")
    state = asked(address, "state").json()
    assert [row["study"] for row in state["rows"]].count("by-hand") == 3
    assert {row["state"] for row in state["rows"]} == {"finished", "to be stopped", "waiting"}
    assert "a clone of" in " ".join(state["events"])
    assert [act.act for act in store(tmp_path).acts()] == ["stop", "resume", "stop", "clone", "clone", "extend"]


def test_a_project_without_samples_is_refused(params, tmp_path):
    (tmp_path / "data/manifests").unlink()
    with pytest.raises(InputError, match="no manifest. Run .* first"):
        Board(params, ["steered"], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_a_trial_is_stopped_and_cloned_in_a_browser(address, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.go(f"{address}/#{TOKEN}")
        page.wait("1 waiting, 1 finished", "steered: row0")
        assert page.run("location.href") == f"{address}/"  # the token stands in no history
        assert page.run("document.querySelectorAll('svg polyline').length") == 1
        press(page, "stop", "2")
        page.wait("stopped after epoch 2", "1 to be stopped")
        press(page, "clone", "learning_rate = 0.01, 0.02")
        page.wait("2 waiting", "by-hand: ")
        press(page, "clone", "rnak = 1")
        page.wait("no setting 'rnak' to change")


def press(page: Any, act: str, text: str) -> None:
    """Press the first button of a name, fill its form in and send it."""
    page.run(f"[...document.querySelectorAll('#rows button')].find((b) => b.textContent === '{act}').click()")
    page.run(f"document.getElementById('given').value = {text!r}")
    page.run("document.querySelector('dialog button[value=do]').click()")
