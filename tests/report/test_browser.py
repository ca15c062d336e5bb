"""The page in a real browser, where one is installed: desk and phone, light and dark, with scripts and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import write_index
from tests.support.chromium import PROGRAM, Page, browser

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")]
STUDIES = {
    "hificl-figure10": "HiFICL Figure 10: what training costs",
    "hificl-figure4": "HiFICL Figure 4: sizes",
    "hificl-table1": "HiFICL Table 1: main results",
    "hificl-table2": "HiFICL Table 2: ablations",
    "mimic-main": "MimIC, main results",
    **{f"own-{number}": f"Own study {number}" for number in range(1, 6)},
}
PAPERS = {
    "hificl-table1": "hificl.table1_main",
    "hificl-table2": "hificl.table2_ablation",
    "hificl-figure4": "hificl.figure4",
    "hificl-figure10": "hificl.figure10",
    "mimic-main": "mimic.main",
}


@pytest.fixture(scope="module")
def reports(new_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one study that is open, and one of so many that they are closed."""
    maker = new_maker(tmp_path_factory.mktemp("browser") / "evaluations")
    maker.table("hificl-table1")
    one = write_index(maker.params(**{"hificl-table1": maker.definition()}), maker.folder, maker.folder.parent / "one")
    for name, title in STUDIES.items():
        rows = ("zero-shot", "lora-r16", "hificl") if name != "own-5" else ("zero-shot", "live")
        tasks = ("mini-vqa", "mini-coco")
        maker.study(name, [maker.cell(row, task, 0) for row in rows for task in tasks], title=title)
    studies = {name: maker.definition(paper=PAPERS.get(name)) for name in STUDIES}
    many = write_index(maker.params(**studies), maker.folder, maker.folder.parent / "many")
    return {"one": one.page, "many": many.page}


@contextmanager
def opened(file: Path, profile: Path, width: int = 1400, *, dark: bool = False, script: bool = True) -> Iterator[Page]:
    with browser(profile, width=width) as page:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Emulation.setScriptExecutionDisabled", value=not script)
        page.go(file.as_uri())
        page.wait("Where these numbers come from")
        yield page


def shown(page: Page, what: str) -> list[str]:
    """The texts of the elements that a reader sees."""
    return page.run(
        f"[...document.querySelectorAll({what!r})].filter((one) => one.checkVisibility()).map((one) => one.innerText)"
    )


def click(page: Page, what: str) -> None:
    page.run(f"document.querySelector({what!r}).click()")


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_follows_the_scheme(reports: dict[str, Path], tmp_path: Path, width: int, dark: bool) -> None:
    with opened(reports["one"], tmp_path, width, dark=dark) as page:
        assert page.run("document.documentElement.scrollWidth - innerWidth") <= 0
        silent = "[...document.querySelectorAll('[role=img]')].filter((one) => !one.getAttribute('aria-label')).length"
        assert page.run("document.querySelectorAll('figure svg').length") >= 1 and page.run(silent) == 0
        red = page.run("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
        assert (int(red) < 60) == dark
        # the method and all three tasks are there without scrolling, spread over seeds and all
        edges = page.run(
            "[...document.querySelectorAll('section.study table tbody tr:nth-child(4) td')].slice(0, 3)"
            ".map((one) => one.getBoundingClientRect().right)"
        )
        assert len(edges) == 3 and max(edges) <= width
        widest = page.run("Math.max(...[...document.querySelectorAll('figure svg')].map((s) => s.clientWidth))")
        assert width == 390 or widest <= page.run("document.querySelector('main').clientWidth")


@pytest.mark.parametrize("width", [1024, 1200, 1290])
def test_a_table_wider_than_the_page_scrolls_by_itself(reports: dict[str, Path], tmp_path: Path, width: int) -> None:
    """Where the menu stands beside the page and leaves it less than it asks for."""
    with opened(reports["many"], tmp_path, width) as page:
        page.run("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        page.run("document.querySelector('table.small td').textContent = 'wide '.repeat(200)")
        assert page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        right = page.run("document.querySelector('section.study').getBoundingClientRect().right")
        assert right <= page.run("document.documentElement.clientWidth") - 20


def test_many_studies_are_a_menu_by_paper_and_closed(reports: dict[str, Path], tmp_path: Path) -> None:
    with opened(reports["many"], tmp_path) as page:
        assert shown(page, "nav .group") == ["HiFICL", "MimIC", "Other studies"]
        titles = ["Table 1: main results", "Table 2: ablations", "Figure 4: sizes", "Figure 10: what training costs"]
        assert shown(page, "nav li[data-of] a")[:6] == [*titles, "Main results", "Own study 1"]
        assert shown(page, "section.study h2")[:2] == ["HiFICL Table 1: main results", "HiFICL Table 2: ablations"]
        assert shown(page, ".of-study") == []
        assert len(shown(page, ".best")) == len(STUDIES)
        assert page.run("document.documentElement.scrollHeight") < 2500
        page.run("scrollTo(0, 1000)")
        assert abs(page.run("document.querySelector('nav').getBoundingClientRect().top")) < 1  # it stays in sight
        click(page, "nav a[href='#mimic-main']")
        page.until(lambda: len(shown(page, ".of-study")) == 1, lambda: "the study did not open")
        click(page, "[data-all=open]")
        assert len(shown(page, ".of-study")) == len(STUDIES)
        click(page, "[data-all='']")
        assert shown(page, ".of-study") == []


def test_the_filter_finds_by_title_method_and_task(reports: dict[str, Path], tmp_path: Path) -> None:
    with opened(reports["many"], tmp_path) as page:
        for words, found in (
            ("ablations", ["Table 2: ablations"]),
            ("LIVE mini-coco", ["Own study 5"]),
            ("hificl table", ["Table 1: main results", "Table 2: ablations"]),
            ("no such", []),
            ("", [*shown(page, "nav li[data-of] a")]),
        ):
            page.run(
                f"box.value = {words!r}; box.dispatchEvent(new Event('input'))".replace(
                    "box", "document.querySelector('input[type=search]')"
                )
            )
            assert shown(page, "nav li[data-of] a") == found
            assert len(shown(page, "section.study")) == len(found)
            assert shown(page, "nav [role=status]") == ([f"{len(found)} of {len(STUDIES)}"] if words else [""])
            assert ("MimIC" in shown(page, "nav .group")) == (words == "")


def test_a_column_sorts_its_rows_within_their_backbone(reports: dict[str, Path], tmp_path: Path) -> None:
    with opened(reports["one"], tmp_path) as page:
        page.run("document.querySelector('section.study table.sortable').id = 'first'")
        rows = "#first tbody tr:not(.group) th"
        before = shown(page, rows)
        values = "[...document.querySelectorAll('#first tr:not(.group) td:nth-child(4)')]"
        seen = {}
        for turn in ("descending", "ascending", None):
            click(page, "#first thead th:nth-child(4) button")
            assert page.run("document.querySelector('#first thead th:nth-child(4)').ariaSort") == turn
            seen[turn] = page.run(f"{values}.map((one) => one.dataset.value ?? null)")
        falling, rising = ([float(one) for one in seen[turn] if one] for turn in ("descending", "ascending"))
        assert len(falling) == 5 and falling == sorted(falling, reverse=True) and rising == sorted(rising)
        assert seen["descending"][-1] is seen["ascending"][-1] is None  # LIVE's captions are missing: always last
        assert shown(page, rows) == before
        assert shown(page, "#first tbody tr:first-child")[0].startswith(
            "mini-Idefics2"
        )  # the backbone's line stays on top


def test_a_number_opens_its_run(reports: dict[str, Path], tmp_path: Path) -> None:
    with opened(reports["many"], tmp_path) as page:
        click(page, "#hificl-table2 td.number a")
        page.until(
            lambda: "hificl-table2-run-1" in page.run("location.hash") and shown(page, "#hificl-table2-run-1"),
            lambda: "the table of runs did not open",
        )
        top = "document.getElementById('hificl-table2-run-1').getBoundingClientRect().top"
        page.until(lambda: 0 <= page.run(top) < 900, lambda: "the run is not in sight")


def test_on_a_phone_the_menu_is_closed_until_asked_for(reports: dict[str, Path], tmp_path: Path) -> None:
    with opened(reports["many"], tmp_path, 390) as page:
        assert shown(page, "nav a") == []
        click(page, "nav summary")
        assert len(shown(page, "nav li[data-of] a")) == len(STUDIES)
        click(page, "nav a[href='#own-3']")
        page.until(lambda: shown(page, "#own-3") and not shown(page, "nav a"), lambda: "the menu did not close")


def test_without_scripts_everything_is_there(reports: dict[str, Path], tmp_path: Path) -> None:
    with opened(reports["many"], tmp_path, script=False) as page:
        assert shown(page, ".tools") == []
        assert len(shown(page, "nav li[data-of] a")) == len(shown(page, "section.study summary h2")) == len(STUDIES)
        page.go(reports["many"].as_uri() + "#own-3")
        page.until(lambda: len(shown(page, ".of-study")) == 1, lambda: "a link does not open its study")
        assert "Zero-shot" in shown(page, "#own-3")[0]
