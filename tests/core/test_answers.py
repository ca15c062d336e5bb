"""What a command answers: a table in a terminal, JSON in a pipe, and the one that is asked for in either."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass

import pytest

from pipeline.core.errors import WorkError
from pipeline.core.terminal import Answer, Fields, Rows, print_answer, short, table
from tests.commands.test_cli import hificl
from tests.conftest import ROOT
from tests.support.terminal import Terminal

ESCAPE = "\x1b"


def in_a_terminal(tmp_path, *words: str) -> str:
    terminal = Terminal(
        ["-m", "pipeline", *words], ROOT, {**os.environ, "COLUMNS": "100", "LINES": "40"}, tmp_path / "shown"
    )
    terminal.process.wait(60)
    return terminal.close()


def test_a_terminal_gets_a_table_and_json_where_it_is_asked_for(tmp_path):
    shown = in_a_terminal(tmp_path, "tasks")
    assert ESCAPE in shown and "mini-okvqa" in shown and '"name"' not in shown
    assert json.loads(in_a_terminal(tmp_path, "tasks", "--json"))[0]["name"] == "coco"


def test_a_pipe_gets_json_and_a_plain_table_where_it_is_asked_for():
    piped, table_of = hificl("tasks"), hificl("tasks", "--table")
    rows = json.loads(piped.stdout)
    assert {row["name"] for row in rows} >= {"vqav2", "mini-coco"}
    lines = table_of.stdout.splitlines()
    assert ESCAPE not in table_of.stdout and lines[0].split()[:2] == ["task", "metric"]
    assert len(lines) == 2 + len(rows) and all(len(line) <= 80 for line in lines)


def test_both_at_once_are_refused():
    done = hificl("tasks", "--table", "--json")
    assert done.returncode == 2 and "not allowed with" in done.stderr


def test_doctor_ends_with_1_where_something_is_missing_in_a_table_too():
    done = hificl("doctor", "--profile", "real", "--table")
    assert done.returncode == 1 and done.stderr.startswith("error: missing for profile 'real': ")
    row = next(line for line in done.stdout.splitlines() if line.startswith("data of vqav2"))
    assert row.split()[3] == "missing"
    assert any(line.startswith("data of vqav2: Looked at: ") for line in done.stdout.splitlines())


@dataclass(frozen=True)
class _Wrong(Answer):
    def record(self):
        return {"value": float("nan")}

    def shown(self):
        yield "one line"

    @property
    def problem(self):
        return "it is not in order"


@pytest.mark.parametrize(("form", "out"), [(None, '"value": NaN'), ("table", "one line")])
def test_an_answer_is_printed_before_its_problem_ends_the_command(capsys, form, out):
    with pytest.raises(WorkError, match="not in order"):
        print_answer(_Wrong(), form)
    assert out in capsys.readouterr().out


def test_facts_nest_and_a_long_line_is_not_broken(capsys):
    path = "/a/" + "long/" * 40
    print_answer(
        Fields({"path": path, "none": None, "parts": {"of": 1234, "share": 0.123456}, "all": ["a", "b"]}), "table"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"path   {path}", "none   -", "parts", "  of     1,234", "  share  0.1235", "all    a", "       b"]


def test_rows_show_numbers_at_the_right_and_markup_as_it_stands(capsys):
    print_answer(
        Rows([{"a": "[red]x[/red]", "b": 7}, {"a": ":smile:", "b": 1000}], {"a": "name", "b": "count"}), "table"
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == ["[red]x[/red]      7", ":smile:       1,000"]


def test_values_are_said_short():
    assert [short(one) for one in (None, True, 1e-5, 12345, [], {"a": 1, "b": {"c": False}})] == [
        "-", "yes", "1e-05", "12,345", "-", "a=1 b(c=no)",
    ]  # fmt: skip


def test_a_rows_name_and_numbers_are_never_broken():
    from rich.console import Console

    made = table("name", "text", "number", right=("number",))
    made.add_row("a-name-of-some-length", "words " * 20, "123456789")
    console = Console(file=io.StringIO(), width=50)
    console.print(made)
    first = console.file.getvalue().splitlines()[2]
    assert first.startswith("a-name-of-some-length ") and first.rstrip().endswith(" 123456789")
