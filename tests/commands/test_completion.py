"""A shell's question of how a word goes on is answered with verbs, options, studies and profiles."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.commands.test_cli import hificl
from tests.conftest import ROOT


def completed(line: str, tmp_path) -> set[str]:
    answer = tmp_path / "answer"
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", "from pipeline.cli import main; main()"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    return set(answer.read_text().split("\n"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hificl stu", {"study", "studies"}),
        ("hificl sweep --st", {"--study"}),
        ("hificl sweep --study hificl-table1", {"hificl-table1"}),
        ("hificl study hificl-table1 hificl-figure1", {"hificl-figure10"}),
        ("hificl doctor --profile real", {"real", "real-check", "real-weights", "real-weights-words"}),
        ("hificl score cap", {"caption"}),
        ("hificl bench --device cu", {"cuda"}),
    ],
)
def test_a_word_goes_on_as_the_command_line_knows_it(line, words, tmp_path):
    assert completed(line, tmp_path) == words


def test_bash_takes_the_code_that_is_printed_for_it():
    done = hificl("completion", "bash")
    assert done.returncode == 0
    said = subprocess.check_output(["bash", "-c", f"{done.stdout}\ncomplete -p hificl"], text=True)
    assert said.endswith("_python_argcomplete hificl\n")
    assert hificl("completion", "csh").returncode == 2
