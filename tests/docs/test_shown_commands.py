"""Every command of README.md and docs/*.md: run in a small project, or parsed where `commands.NOT_RUN` says why."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from pipeline.cli import command_line
from tests.conftest import ROOT
from tests.docs.commands import PAGES, every, inline

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
COMMANDS = every()
RUN = [one for one in COMMANDS if one.reason is None]
PARSED = [one for one in COMMANDS if one.reason is not None]


@pytest.mark.parametrize("command", RUN, ids=[f"{one.page}: {one.text[:70]}" for one in RUN])
def test_it_runs(reader, command):
    words = reader.words(command.text)
    program = words[0].removeprefix(".venv/bin/")
    assert program == "hificl", f"{program}: give `tests/docs/commands.py` a reason not to run it"
    status, out, err = reader.hificl(words[1:])
    assert status == 0, err[-2000:]
    if out.strip() and words[1] not in ("bench", "--help"):
        json.loads(out)


@pytest.mark.parametrize("command", [*PARSED, *inline()], ids=lambda one: f"{one.page}: {one.text[:70]}")
def test_it_is_a_command_all_the_same(command):
    program, *rest = command.words
    if program == "hificl":
        words = _filled(rest)
        if len(words) == 1:  # a command that is spoken of
            assert words[0] in command_line()._subparsers._group_actions[0].choices
        else:
            assert hasattr(command_line().parse_args(words), "func")
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "python":
        installed = (ROOT / "tests/harness.txt").read_text() if rest[1] == "lmms_eval" else ""
        assert rest[0] == "-m" and ("lmms-eval==" in installed or importlib.util.find_spec(rest[1]) is not None)
    elif program == "dvc":
        done = subprocess.run(
            [sys.executable, "-m", "dvc", rest[0], "--help"], capture_output=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0


def _filled(words):
    """Return a command's words as a reader would type them: one of `{a,b}`, nothing optional, no `...`."""
    if not set("[{") & set("".join(words)):
        return words
    left_out = re.sub(r"\[[^\]]*\]", "", " ".join(words)).replace("...", "")
    return re.sub(r"\{(\w+)[^}]*\}", r"\1", left_out).split()


def test_pages_link_to_what_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
