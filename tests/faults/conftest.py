"""The battery's fixtures, and the table that it leaves in `docs/faults.md`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.checks import report, results
from tests.faults.sweeps import Sweep, make_sweep
from tests.faults.table import KINDS, OUT, RECORDS, publish

OPEN, CLOSE = (
    "<!-- injected: written by `make test-faults TABLE=docs/faults.md` -->",
    "<!-- end of what was injected -->",
)
RECORD = "battery-cpu.json"
TRIES = 4  # to hold a worker in an epoch of tenths of a second
_rows: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Sweep:
    """A workspace before its sweep."""
    return make_sweep(tmp_path_factory.mktemp("faults") / "template")


@pytest.fixture(scope="session")
def reference(template: Sweep, tmp_path_factory) -> dict[str, Any]:
    """What the undisturbed sweep gives."""
    made = template.copy(tmp_path_factory.mktemp("faults") / "reference")
    made.again()
    found = {"results": results(made), "report": report(made)}
    assert len(found["results"]) == 4 and {row["status"] for row in found["results"].values()} == {"finished"}
    return found


@pytest.fixture
def sweep(template: Sweep, tmp_path: Path, reference):
    """A fresh workspace of the same four trials."""
    made = template.copy(tmp_path / "sweep")
    yield made
    made.clean_up()


@pytest.fixture(scope="session")
def trained(template: Sweep, tmp_path_factory) -> Sweep:
    """A sweep whose trials are trained and not scored; take copies."""
    made = template.copy(tmp_path_factory.mktemp("faults") / "trained")
    made.again()
    return made


@pytest.fixture(scope="session")
def interrupted(template: Sweep, reference, tmp_path_factory) -> Sweep:
    """A sweep that SIGKILL ended while a trial had two epochs behind it; take copies."""
    for _ in range(TRIES):
        made = template.copy(tmp_path_factory.mktemp("faults") / "interrupted")
        made.begin()
        if made.held_at(2):
            break
        made.clean_up()
    else:
        pytest.fail("no trial was caught with two epochs behind it")
    assert made.stage is not None
    made.stage.kill()
    killed = time.monotonic()
    made.stage.wait()
    while made.processes():
        assert time.monotonic() - killed < 10, "an orphan lives"
        time.sleep(0.1)
    made.remember()
    return made


@pytest.fixture
def resumed(interrupted: Sweep, tmp_path: Path):
    """A copy of the interrupted sweep."""
    made = interrupted.copy(tmp_path / "sweep")
    made.remember()
    yield made
    made.clean_up()


@pytest.fixture
def fault(request):
    """`fault(kind, again=seconds, gone=seconds)` adds a row of `table.KINDS` to the table if the test passes."""
    rows: dict[str, dict[str, Any]] = {}
    started = time.monotonic()

    def note(kind: str, *, again: float | None = None, gone: float | None = None) -> None:
        injected, happens = KINDS[kind]
        rows[kind] = {"injected": injected, "happens": happens, "trains_again_seconds": again, "gone_seconds": gone}

    yield note
    if getattr(request.node, "outcome", None) is not None and request.node.outcome.passed:
        for row in rows.values():
            row["test_seconds"] = round(time.monotonic() - started, 1)
        _rows.update(rows)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call":
        item.outcome = outcome
    return outcome


def pytest_sessionfinish(session):
    """Write the table between its marks in the document that OUT names, and as JSON below benchmarks/.

    Kinds that this session has not injected keep the figures that they have; each row names its commit.
    """
    if not _rows or not os.environ.get(OUT):
        return
    from benchmarks.support.timing import commit

    record = RECORDS / RECORD
    earlier = json.loads(record.read_text(encoding="utf-8"))["faults"] if record.exists() else {}
    now = {
        kind: {**row, "commit": commit(), "load_average": round(os.getloadavg()[0], 1)} for kind, row in _rows.items()
    }
    rows = {kind: row for kind in KINDS if (row := now.get(kind) or earlier.get(kind))}
    lines = ["| injected | what happens | trains again after | no process left after |", "|---|---|---|---|"]
    for kind, row in rows.items():
        figures = (_seconds(row[name]) for name in ("trains_again_seconds", "gone_seconds"))
        lines.append(f"| {' | '.join((*KINDS[kind], *figures))} |")
    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    lines += ["", f"{len(rows)} of {len(KINDS)} kinds, the last {len(now)} with {os.cpu_count()} cores and {load}."]
    publish(OPEN, CLOSE, lines, RECORD, {"faults": rows})


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
