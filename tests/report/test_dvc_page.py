"""The page of `dvc plots` in a real browser: DVC fills it, and no network is there."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from dvc_render import render_html
from dvc_render.vega import VegaRenderer

from pipeline.report import load_table, writers
from tests.conftest import ROOT
from tests.support.chromium import PROGRAM, browser

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")]


def _page(folder: Path, name: str, rows: list[dict[str, Any]], template: str, **axes: str) -> Path:
    plot = VegaRenderer(rows, name, template=template, template_dir=str(ROOT / ".dvc/plots"), **axes)
    render_html([plot], folder / "index.html", html_template=ROOT / ".dvc/page.html")
    return folder / "index.html"


def _scores(maker: Any, values: dict[str, float], revision: str) -> list[dict[str, Any]]:
    maker.study("mine", [maker.cell(row, "mini-vqa", 0) | {"value": value} for row, value in values.items()])
    table = load_table("mine", maker.params(mine=maker.definition(paper=None)), maker.folder)
    return [row | {"rev": revision} for row in csv.DictReader(io.StringIO(writers.to_scores([table])))]


def test_scores_of_two_revisions_stand_side_by_side_with_their_change(maker: Any, tmp_path: Path) -> None:
    before = _scores(maker, {"zero-shot": 26.5, "hificl": 80.0}, "HEAD")
    after = _scores(maker, {"zero-shot": 26.5, "hificl": 81.25, "mimic": 70.0}, "faster")
    page = _page(tmp_path, "scores.csv", before + after, "scores", x="value", y="method")
    with browser(tmp_path / "profile", width=1000) as shown:
        shown.go(page.as_uri())
        shown.wait("mine · mini-idefics2 · mini-vqa · accuracy · percent")
        lines = shown.run(
            "[...document.querySelectorAll('tr')].map((line) => line.innerText.split(/\\s+/).join(' ').trim())"
        )
        assert lines == [
            "method HEAD faster change",
            "zero-shot 26.50 26.50 0.00",
            "hificl 80.00 81.25 +1.25",
            "mimic – 70.00 –",
        ]
        widths = shown.run("[...document.querySelectorAll('td.bar i')].map((bar) => bar.getBoundingClientRect().width)")
        assert widths[3] == max(widths) and widths[0] / widths[3] == pytest.approx(26.5 / 81.25, abs=0.01)
        assert shown.run("performance.getEntriesByType('resource').length") == 0
        assert shown.run("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_plot_of_the_users_own_is_a_table(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / (step + 1), "rev": "workspace"} for step in range(2)]
    page = _page(tmp_path, "losses.json", rows, "linear", x="step", y="loss", title="losses.json")
    with browser(tmp_path / "profile") as shown:
        shown.go(page.as_uri())
        assert "0.5" in shown.wait("losses.json", "loss")
        assert shown.run("performance.getEntriesByType('resource').length") == 0
