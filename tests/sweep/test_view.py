"""The live view of a sweep: rows that differ at any width, what ended last on top, the best by task."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.records.journal import JournalEvent
from pipeline.records.trial import EpochReport
from pipeline.sweep import view
from pipeline.sweep.view import View
from tests.plan.test_plan_order import plan_of


def _todo(plan):
    return [key for key, config in plan.trials.items() if config.trained]


def _drawn(shown: View, monkeypatch: pytest.MonkeyPatch, width: int, height: int = 60) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    monkeypatch.setattr(view, "console", console)
    console.print(shown._drawn())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.fixture
def plan():
    return plan_of("hificl-table1", "hificl-figure7")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_all_share_is_said_once_and_every_row_has_what_tells_it_apart(plan, monkeypatch, width):
    keys = _todo(plan)
    shown = View(plan, keys)
    for key in keys:
        shown.on_start(key)
    names = [trial.name for trial in shown.running.values()]
    assert len(set(names)) == len(names)
    lines = _drawn(shown, monkeypatch, width)
    text = " ".join(" ".join(lines).split())
    assert text.count("mini-idefics2") == 1 and text.count("hificl-figure7") == 1
    for trial in shown.running.values():
        words = trial.name.split()
        assert any(words[0] in line and f"/{trial.config.epochs}" in line for line in lines)
        assert all(word in text for word in words)
    assert all(len(line) <= width for line in lines)


def test_a_row_says_its_epoch_and_what_ended_last_stands_on_top(plan, monkeypatch):
    keys = _todo(plan)
    shown = View(plan, keys)
    for key in keys[:3]:
        shown.on_start(key)
        shown.on_report(key, EpochReport(epoch=2, seconds=1.0, objective=50.0))
    shown.on_end(keys[0], None)
    shown.on_end(keys[2], "out of memory")
    (running,) = shown.running.values()
    lines = _drawn(shown, monkeypatch, 80)
    rows = lines[next(number for number, line in enumerate(lines) if line.startswith("trial")) + 2 :]
    assert rows[0].split()[-3:] == [f"3/{running.config.epochs}", "50", "runs"]
    assert [row.split()[-1] for row in rows[:3]] == ["runs", "failed", "done"]
    assert f"2 of {len(keys)}, 1 failed" in lines[0]


def test_rows_leave_the_terminal_its_height(plan, monkeypatch):
    keys = _todo(plan)
    shown = View(plan, keys)
    for key in keys:
        shown.on_start(key)
    for width in (40, 80):
        assert len(_drawn(shown, monkeypatch, width, height=12)) <= 11


def test_the_best_is_of_a_task_and_never_over_two_metrics(plan, monkeypatch, capsys):
    keys = _todo(plan)
    with View(plan, keys) as shown:
        for key, objective in zip(keys, range(len(keys)), strict=True):
            shown.on_report(key, EpochReport(epoch=1, seconds=1.0, objective=objective))
    for task, best in shown.best.items():
        asked = [at for at, key in enumerate(keys) if plan.trials[key].task == task]
        assert best.objective == max(asked)
    lines = _drawn(shown, monkeypatch, 80)
    assert sum(line.startswith("best ") for line in lines) == 3
    assert any(line.startswith("best mini-coco: CIDEr ") for line in lines)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "accuracy " in last and "CIDEr " in last and len(last) < 100


def test_a_loss_that_chooses_is_shown_as_it_is_and_the_lowest_is_best(plan):
    keys = [key for key in _todo(plan) if plan.trials[key].task == "mini-vqa"][:2]
    plan.trials.update({key: plan.trials[key].model_copy(update={"selection_metric": "loss"}) for key in keys})
    shown = View(plan, keys)
    for key, loss in zip(keys, (0.5, 0.25), strict=True):
        shown.on_report(key, EpochReport(epoch=1, seconds=1.0, objective=-loss))
    assert [trial.score for trial in shown.running.values()] == [0.5, 0.25]
    assert str(shown.best["mini-vqa"]) == "loss 0.25"


def test_an_event_is_one_line_whatever_ray_says(capsys):
    with View(plan_of("hificl-figure7"), []) as shown:
        why = "out of memory\nTop 10 users:\n" + "x" * 999
        shown.on_event(JournalEvent(time=1.0, event="slot lost", why=why, slot=2))
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("slot lost"))
    assert line == "slot lost: why out of memory, slot 2 (all of it in runs/journal.jsonl)"
