"""Every scoring command that the documentation shows is run, and prints what the documentation says."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from pipeline import tasks
from pipeline.cli import main
from tests.conftest import ROOT

DOCUMENT = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^hificl (score .+)\n# (.+)$", DOCUMENT, re.MULTILINE)


def entry(numbers: dict, name: str) -> float:
    """`overall.n` of {"overall": {"n": 3}}."""
    value = numbers
    for part in name.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize(("command", "printed"), SHOWN, ids=[command.split(" --")[0] for command, _ in SHOWN])
def test_a_command_prints_what_the_document_says(command, printed, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(shlex.split(command))
    assert end.value.code in (None, 0)
    numbers = json.loads(capsys.readouterr().out)
    for name, shown in (pair.split(" = ") for pair in printed.split(", ")):
        digits = len(shown.partition(".")[2])
        assert round(entry(numbers, name), digits) == float(shown), name


def test_no_command_goes_untested():
    assert len(SHOWN) == len(re.findall(r"hificl score .*--", DOCUMENT)) > 8


def test_every_published_task_has_its_section():
    published = {task.stands_for for task in map(tasks.get, tasks.names())}
    assert published <= set(re.findall(r"^## (.+)$", DOCUMENT, re.MULTILINE))
