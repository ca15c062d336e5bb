"""A study's table in the terminal: the report's numbers, whole at any width, plain where nothing shows bold."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from pipeline.report import load_table
from pipeline.report.writers import Results, StudyResults, to_markdown


def _printed(table: Any, width: int, **terminal: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **terminal)
    console.print(Results(table))
    return console.file.getvalue()


def _rows(text: str, names: Any) -> dict[str, list[str]]:
    """Return the numbers behind each name, over all pieces of the table."""
    lines = text.splitlines()
    return {
        name: [one for line in lines if line.startswith(f"{name} ") for one in NUMBER.findall(line[len(name) :])]
        for name in names
    }


@pytest.fixture
def table(maker: Any) -> Any:
    maker.table()
    return load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)


NUMBER = re.compile(r"missing|\d+\.\d+\*?(?: * ± +\d+\.\d+)?")
LABELS = ("Zero-shot", "8-shot ICL", "LoRA", "LIVE", "MimIC", "HiFICL")


@pytest.mark.parametrize("width", [40, 80, 100])
def test_every_number_stands_with_its_spread_and_no_line_is_wider(table: Any, width: int) -> None:
    text = _printed(table, width)
    assert all(len(line) <= width for line in text.splitlines())
    rows = _rows(text, LABELS)
    for line in table.lines:
        for entry, shown in zip(table.row(line), rows[line.label], strict=True):
            if entry.value is None:
                assert shown == "missing"
                continue
            digits = 4 if entry.metric == "CIDEr" else 2
            value, spread = shown.split("±")
            assert float(value.rstrip("* ")) == pytest.approx(entry.value, abs=0.6 * 10**-digits)
            assert float(spread) == pytest.approx(entry.std, abs=0.6 * 10**-digits)
            assert value.rstrip().endswith("*") == (entry.mark == "best")
    assert "over 2 to 3 seeds" in " ".join(text.split()) and "paper" not in text


def test_a_metric_that_a_task_does_not_have_is_a_dash(maker: Any) -> None:
    maker.table()
    definition = {**maker.definition(), "metrics": ["CHAIRs"]}
    with_chair = load_table("hificl-table1", maker.params(**{"hificl-table1": definition}), maker.folder)
    assert "done" not in _printed(with_chair, 100)
    rows = to_markdown(with_chair, []).splitlines()
    (zero_shot,) = [row for row in rows if row.startswith("| Zero-shot")]
    assert "done" not in zero_shot and "| - |" in zero_shot


def test_what_failed_is_said_once_with_its_reason(table: Any) -> None:
    text = " ".join(_printed(table, 80).split())
    assert "LoRA, mini-Idefics2, mini-vqa, seed 1: failed. the loss became NaN at step 3" in text
    assert "LIVE, mini-Idefics2, mini-coco, seeds 0, 1, 2: missing" in text


def test_marks_are_shown_where_a_terminal_can_and_escape_codes_nowhere_else(table: Any) -> None:
    assert "\x1b" not in _printed(table, 80)
    assert "\x1b[1m" in _printed(table, 80, force_terminal=True, color_system="standard")


def test_the_papers_figure_stands_beside_ours_on_its_own_backbone(maker: Any) -> None:
    same = {"backbone": "idefics2-8b-base", "paper_backbone": "idefics2-8b-base"}
    cells = [maker.cell(row, "mini-vqa", 0, **same) | {"task": "vqav2"} for row in maker.rows]
    maker.study("hificl-table1", cells)
    known = maker.params(**{"hificl-table1": maker.definition()})
    text = _printed(load_table("hificl-table1", known, maker.folder), 80)
    assert "paper" in text and "stands for" not in text
    rows = _rows(text, LABELS)
    assert rows["HiFICL"][1] == "72.08" and rows["8-shot ICL"][1] == "66.20" and "one seed" in text


def test_a_curve_has_a_row_a_point_below_its_name(maker: Any) -> None:
    cells = [
        maker.cell(row, "mini-vqa", 0, vary={"rank": rank}) | {"value": float(10 * rank)}
        for row in ("hificl", "lora-r16")
        for rank in (1, 4, 8)
    ]
    maker.study("hificl-figure7", cells)
    definition = maker.definition(paper="hificl.figure7", layout="curve", vary={"rank": [1, 4, 8]})
    text = _printed(load_table("hificl-figure7", maker.params(**{"hificl-figure7": definition}), maker.folder), 80)
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("HiFICL "))
    assert [line.split() for line in lines[at : at + 4]] == [
        ["HiFICL", "1", "10.00"], ["4", "40.00"], ["8", "80.00*"], ["LoRA", "1", "10.00"],
    ]  # fmt: skip


def test_the_record_has_every_cell_as_the_csv_does(table: Any) -> None:
    rows = StudyResults([table]).record()["hificl-table1"]
    with_paper = next(row for row in rows if (row["method"], row["task"]) == ("hificl", "mini-coco"))
    assert len(rows) == len(LABELS) * 3 and with_paper["paper"] == 1.2951 and with_paper["unit"] == "ratio"
    entries = [entry for line in table.lines for entry in table.row(line)]
    assert [row["value"] for row in rows] == [entry.value for entry in entries]
