"""Saved results as Markdown, and the list of verbs that `make bench` goes through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.support.table import CLOSE, OPEN, goals
from pipeline.core.errors import InputError
from tests.conftest import ROOT

RESULT = {
    "ratios": {"a_over_b": 1.23456, "seconds": 2.0},
    "spread": {"a_over_b": [1.2, 1.3], "seconds": 0.5},
    "growth": {"by_n": {"8": 1.0, "32": 1.5}},
    "machine": {"cpu_count": 2, "threads": 1, "load_average": [0.5, 0.4, 0.3]},
    "versions": {"torch": "2.0"},
    "method": "How it was done.",
}


def test_a_result_becomes_a_section(tmp_path: Path) -> None:
    (tmp_path / "attention-cpu.json").write_text(json.dumps(RESULT), encoding="utf-8")
    text = benchmarks.table(tmp_path)
    for part in (
        "### attention-cpu", "| a_over_b | 1.235 | 1.2 to 1.3 |", "| seconds | 2 | range 0.5 of the median |",
        "by_n: 8: 1, 32: 1.5", "*How it was done.*", "1 thread(s); torch 2.0; load average at the end 0.5",
    ):  # fmt: skip
        assert part in text


def test_the_committed_results_took_the_minutes_that_the_document_says() -> None:
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "benchmarks").glob("*-cpu.json")]
    took = [result["took_seconds"] for result in measured if "took_seconds" in result]  # by one `make bench`
    assert len(took) == len(benchmarks.verbs()) - 2  # but for `cuda` and `exits`
    assert sum(took) <= 20 * 60
    assert "20 minutes in all, of two quiet cores" in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["", "[]", '{"ratios": {}}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.json"):
        benchmarks.table(tmp_path)


def test_a_document_is_brought_up_to_date_between_its_marks(tmp_path: Path) -> None:
    (tmp_path / "attention-cpu.json").write_text(json.dumps(RESULT), encoding="utf-8")
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{OPEN}\nold\n{CLOSE}\nafter\n", encoding="utf-8")
    for _ in range(2):
        benchmarks.table(tmp_path, into=document)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert text.count("### attention-cpu") == 1
    document.write_text("no marks", encoding="utf-8")
    with pytest.raises(InputError, match="has no marks"):
        benchmarks.table(tmp_path, into=document)


def test_a_mark_that_names_a_verb_has_that_verbs_results_alone(tmp_path: Path) -> None:
    for name in ("attention-cpu", "faults-cpu", "faults-cuda"):
        (tmp_path / f"{name}.json").write_text(json.dumps(RESULT), encoding="utf-8")
    document = tmp_path / "faults.md"
    document.write_text(
        f"before\n{OPEN.replace('measured', 'measured faults')}\nold\n{CLOSE}\nafter\n", encoding="utf-8"
    )
    for _ in range(2):
        benchmarks.table(tmp_path, into=document)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- measured faults:") and text.endswith(f"{CLOSE}\nafter\n")
    assert "old" not in text and text.count("### faults-") == 2 and "### attention" not in text


def test_goals_stand_beside_what_was_reached(tmp_path: Path) -> None:
    (tmp_path / "x-cpu.json").write_text(json.dumps(RESULT), encoding="utf-8")
    file = tmp_path / "goals.yaml"
    rows = [("a_over_b", "at_least: 1.2"), ("a_over_b", "at_most: 1.2"), ("seconds", "at_most: 2"), ("c", "at_most: 1")]
    file.write_text("".join(f"- {{what: w, result: x-cpu, ratio: {name}, {asked}}}\n" for name, asked in rows))
    assert [line.split(" | ")[1:] for line in goals(tmp_path, file).splitlines()[2:]] == [
        ["≥ 1.2", "1.235", "reached |"],
        ["≤ 1.2", "1.235", "**missed** |"],
        ["≤ 2", "2", "reached |"],
        ["≤ 1", "-", "not measured |"],
    ]
    file.write_text("- {what: w, result: x-cpu, ratio: a, limit: 1}\n")
    with pytest.raises(InputError, match=r"goals\.yaml:1: unknown field 'limit'"):
        goals(tmp_path, file)
    file.write_text("- {what: w, result: x-cpu, ratio: a}\n")
    with pytest.raises(InputError, match="needs at_least or at_most"):
        goals(tmp_path, file)


def test_the_goals_table_of_the_documentation_is_that_of_the_committed_results() -> None:
    table = goals(ROOT / "benchmarks")
    assert table in (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert table.count("reached |") > 3 and "not measured" not in table


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results"):
        benchmarks.table(tmp_path)


def test_every_verb_of_the_list_is_a_module_with_run() -> None:
    assert {"attention", "decode", "evaluate", "reuse", "step", "subsample"} <= set(benchmarks.verbs())
    assert not [verb for verb in benchmarks.verbs() if verb.startswith("_")]


def test_an_unknown_verb_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="attention"):
        benchmarks.run("atention")


def test_a_copy_without_the_benchmarks_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    (tmp_path / "benchmarks").mkdir()  # results alone
    code = "import sys, runpy\nsys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
    code += "sys.argv = ['hificl', 'bench', 'step']\nrunpy.run_module('pipeline', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: the benchmarks are not installed. Run it in a checkout of hificl-lab after make setup, which installs "
        "its folder benchmarks/ too"
    ]
