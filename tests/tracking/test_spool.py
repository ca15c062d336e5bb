"""The spool's file, and the tracker in front of a store that is not there. A server that goes away: tests/faults."""

from __future__ import annotations

import json
import time

import pytest

from pipeline.errors import WorkError
from pipeline.tracking.runs import Tracker
from pipeline.tracking.spool import PENDING, SpooledTracker, SpoolFile
from tests.support.free_port import free_port


def entry(number: int) -> dict:
    return {"do": "log_epochs", "run": "r", "with": {"rows": [{"epoch": number, "loss": 0.5}]}}


def test_entries_come_back_in_order_and_delivered_ones_do_not(tmp_path):
    spool = SpoolFile(tmp_path / "spool/s.jsonl", "http://user:secret@127.0.0.1:1")
    for number in range(4):
        spool.add(entry(number))
    spool.runs["pending:p:k"] = "real"
    spool.delivered(3)
    again = SpoolFile(spool.path, spool.uri)
    assert again.entries == [entry(3)] and again.runs == {"pending:p:k": "real"}
    assert "secret" not in spool.path.read_text()
    again.add(entry(4))
    again.delivered(1)
    assert SpoolFile(spool.path, spool.uri).entries == [entry(4)]
    again.delivered(1)
    assert not spool.path.exists()


def test_a_line_torn_by_a_crash_hides_no_other(tmp_path):
    spool = SpoolFile(tmp_path / "s.jsonl", "http://127.0.0.1:1")
    spool.add(entry(0))
    with spool.path.open("a") as file:
        file.write(json.dumps(entry(1))[:20])
    again = SpoolFile(spool.path, spool.uri)
    assert again.entries == [entry(0)]
    again.add(entry(2))
    assert SpoolFile(spool.path, spool.uri).entries == [entry(0), entry(2)]


def test_a_server_that_is_not_there_costs_seconds_and_loses_nothing(tmp_path):
    uri = f"http://127.0.0.1:{free_port()}"
    spooled = SpooledTracker(Tracker(uri, tmp_path), tmp_path / ".spool")
    started = time.monotonic()
    run = spooled.open_trial("s", "p", key="k", name="n", params={"rank": 1}, datasets=[], tags={})
    assert run == f"{PENDING}p:k"
    for epoch in (1, 2):
        spooled.log_epochs(run, [{"epoch": epoch, "loss": 1 / epoch}])
    spooled.close(run, "FINISHED")
    assert time.monotonic() - started < 30 and spooled.waiting == 4
    with pytest.raises(WorkError) as caught:
        spooled.settle(0)
    assert uri in str(caught.value) and "4 entries" in str(caught.value) and str(spooled.file.path) in str(caught.value)
    kept = [json.loads(line) for line in spooled.file.path.read_text().splitlines()][1:]
    assert [row["do"] for row in kept] == ["open_trial", "log_epochs", "log_epochs", "close"]
    assert SpooledTracker(Tracker(uri, tmp_path), tmp_path / ".spool").waiting == 4
