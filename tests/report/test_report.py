"""Whole reports from synthetic evaluation files."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from pipeline.core.errors import InputError
from pipeline.report import forget, load_table, study_page, write_index, write_numbers, write_study
from pipeline.report.sections import tried_settings

HOSTILE = "<script>alert(1)</script>|\"'&`$x_1$ [a](javascript:b)"
COLUMNS = ["backbone", "task", "method", "metric", "value", "std", "seeds", "paper", "run_ids"]


class Page(HTMLParser):
    """What a page loads, runs and links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "data", "poster", "xlink:href") or (name == "href" and tag != "a"):
                self.loads.append(value or "")
            elif name == "href":
                self.links.append(value or "")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    return rows


@pytest.fixture(scope="module")
def main(new_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One report that the tests below only read."""
    maker = new_maker(tmp_path_factory.mktemp("main") / "evaluations")
    cells = maker.table("hificl-table1")
    known = maker.params(**{"hificl-table1": maker.definition()})
    out = maker.folder.parent / "reports"
    write_study("hificl-table1", known, maker.folder, out)
    write_index(known, maker.folder, out)
    return {"cells": cells, "params": known, "out": out, "maker": maker}


def test_csv_has_one_row_a_cell_averaged_over_its_seeds(main: dict[str, Any]) -> None:
    rows = rows_of(main["out"] / "hificl-table1.csv")
    assert len(rows) == len(main["maker"].rows) * 3
    for row in rows:
        mine = [c for c in main["cells"] if (c["row"], c["task"]) == (row["method"], row["task"])]
        values = [cell["value"] for cell in mine if cell["status"] == "done"]
        assert row["seeds"] == str(len(values))
        assert row["run_ids"].split(";") == ([c["run_id"] for c in mine if c["run_id"]] or [""])
        if values:
            assert float(row["value"]) == pytest.approx(statistics.mean(values), abs=1e-6)
            assert float(row["std"]) == pytest.approx(statistics.stdev(values), abs=1e-6)
        else:
            assert (row["value"], row["std"], row["run_ids"]) == ("", "", "")
    found = {(row["method"], row["task"]): row for row in rows}
    assert found["hificl", "mini-coco"]["paper"] == "1.2951"
    assert found["hificl", "mini-coco"]["metric"] == "CIDEr"
    assert found["lora-r16", "mini-vqa"]["seeds"] == "2"
    assert found["live", "mini-coco"]["seeds"] == "0"


def test_captions_are_in_the_unit_of_the_studys_own_paper(maker: Any) -> None:
    cells = [maker.cell("mimic", "mini-coco", 0)]
    known = maker.params(**{"mimic-main": maker.definition(paper="mimic.main"), "hificl-table1": maker.definition()})
    values = {}
    for study in known.studies:
        maker.study(study, cells)
        write_study(study, known, maker.folder, maker.folder.parent)
        (row,) = rows_of(maker.folder.parent / f"{study}.csv")
        values[study] = (float(row["value"]), float(row["paper"]))
    assert values["hificl-table1"] == (pytest.approx(cells[0]["value"]), 1.2827)
    assert values["mimic-main"] == (pytest.approx(100 * cells[0]["value"]), 132.87)


def test_varied_axes_and_further_metrics_are_rows(maker: Any) -> None:
    cells = [
        maker.cell("hificl", "mini-coco", 0, vary={"rank": rank}, lift=rank / 100) | {"metrics": {"CHAIRs": 0.04}}
        for rank in (1, 8)
    ]
    maker.study("hificl-figure7", cells)
    study = maker.definition(paper="hificl.figure7", layout="curve", metrics=["chair_s"], vary={"rank": [1, 8]})
    known = maker.params(**{"hificl-figure7": study})
    write_study("hificl-figure7", known, maker.folder, maker.folder.parent)
    rows = rows_of(maker.folder.parent / "hificl-figure7.csv")
    assert [(row["method"], row["metric"]) for row in rows] == [
        ("hificl rank=1", "CIDEr"),
        ("hificl rank=1", "chair_s"),
        ("hificl rank=8", "CIDEr"),
        ("hificl rank=8", "chair_s"),
    ]
    assert [row["value"] for row in rows if row["metric"] == "chair_s"] == ["4", "4"]
    pictures = maker.folder.parent / "figures/hificl-figure7"
    assert sorted(file.name for file in pictures.iterdir()) == ["over-rank.pdf", "over-rank.png", "over-rank.svg"]
    printed = (pictures / "over-rank.pdf").read_bytes()
    assert printed.startswith(b"%PDF-") and b"/FontFile2" in printed and b"/Type3" not in printed
    with Image.open(pictures / "over-rank.png") as image:
        assert image.width > 1000 and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    metrics = json.loads((maker.folder.parent / "metrics/hificl-figure7.json").read_text())
    assert metrics["mini-coco"]["chair_s"] == {"hificl rank=1": 4.0, "hificl rank=8": 4.0}


def test_best_and_second_share_a_mark_when_they_print_alike(maker: Any) -> None:
    cells = [
        maker.cell(row, "mini-vqa", 0) | {"value": value}
        for row, value in {"a": 80.001, "b": 79.999, "c": 70.0, "hificl": 60.0}.items()
    ]
    maker.study("hificl-table1", cells)
    table = load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    assert [entry.mark for entry in table.entries.values()] == ["best", "best", "second", ""]


def test_a_lower_distance_is_better(maker: Any) -> None:
    cells = [
        maker.cell(row, "mini-vqa", 0) | {"metrics": {"latent_distance": value}}
        for row, value in {"zero-shot": 43.0, "mimic": 30.0}.items()
    ]
    maker.study("mimic-table11", cells)
    study = maker.definition(paper="mimic.table11_latent_distance", metrics=["latent_distance"])
    known = maker.params(**{"mimic-table11": study})
    table = load_table("mimic-table11", known, maker.folder)
    marks = {(line.row, column.metric): entry.mark for (line, column), entry in table.entries.items()}
    assert marks["mimic", "latent_distance"] == "best"
    assert marks["zero-shot", "latent_distance"] == "second"


def test_a_difference_from_the_paper_is_shown_on_the_papers_own_backbone_only(maker: Any) -> None:
    own = {"backbone": "idefics2-8b-base", "task": "vqav2", "value": 72.58}
    known = maker.params(**{"hificl-table1": maker.definition()})
    pages = {}
    for name, more, variant in (("mini", {}, "published"), ("own", own, "published"), ("tiny", own, "tiny")):
        sources = {"idefics2-8b-base": {"variant": variant}}
        here = type(known).model_validate({**known.model_dump(), "backbones": sources})
        maker.study("hificl-table1", [maker.cell("hificl", "mini-vqa", 0) | more])
        pages[name] = study_page("hificl-table1", here, maker.folder)[1]
    assert "paper 72.08 (+0.50)" in pages["own"]
    assert all(
        "paper 72.08" in page and "(+" not in page and "(−" not in page.split("<details>")[0]
        for page in (pages["mini"], pages["tiny"])
    )


def test_differences_are_paired_and_left_out_where_the_score_is_no_mean(maker: Any) -> None:
    known = maker.params(**{"hificl-table1": maker.definition()})
    every = maker.table("hificl-table1")
    table = load_table("hificl-table1", known, maker.folder)
    found = {(line.row, column.task): entry.difference for (line, column), entry in table.entries.items()}
    assert table.reference == "hificl"
    assert found["hificl", "mini-vqa"] is None
    zero = found["zero-shot", "mini-vqa"]
    assert zero is not None
    values = {(line.row, column.task): entry.value for (line, column), entry in table.entries.items()}
    assert zero.mean == pytest.approx(values["zero-shot", "mini-vqa"] - values["hificl", "mini-vqa"])
    assert zero.interval()[1] < 0 and zero.seeds == 3
    maker.study("hificl-table1", [cell | {"measurement": "m.json"} for cell in every])
    table = load_table("hificl-table1", known, maker.folder)  # the samples' scores are not what was measured
    assert not any(entry.difference for entry in table.entries.values())
    cells = [cell | {"value": 50.0} for cell in every if cell["task"] == "mini-vqa"]
    for cell in cells:
        if cell["evaluation"]:
            file = maker.folder / f"{cell['evaluation']}.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"value": 1.0}))
    maker.study("hificl-table1", cells)
    table = load_table("hificl-table1", known, maker.folder)
    assert [entry.difference for entry in table.entries.values()] == [None] * len(maker.rows)


def test_a_reference_without_an_axis_is_every_points(maker: Any) -> None:
    points = [("zero-shot", {}), *(("hificl", {"source_task": task}) for task in ("mini-vqa", "mini-coco"))]
    cells = [maker.cell(row, "mini-vqa", seed, vary=vary) for row, vary in points for seed in range(3)]
    maker.study("miniature-transfer", cells)
    known = maker.params(**{"miniature-transfer": maker.definition(paper=None, reference="zero-shot")})
    table = load_table("miniature-transfer", known, maker.folder)
    base, *others = table.entries.values()
    assert [entry.line.title for entry in others] == [
        f"HiFICL (trained on = {task})" for task in ("mini-vqa", "mini-coco")
    ]
    for entry in others:
        assert entry.difference is not None
        assert entry.difference.mean == pytest.approx((entry.value or 0.0) - (base.value or 0.0))


def test_the_page_stands_alone(main: dict[str, Any]) -> None:
    text = (main["out"] / "index.html").read_text()
    page = Page(text)
    assert [address for address in page.loads if not address.startswith(("#", "data:"))] == []
    assert page.tags.count("script") == 1
    assert "@import" not in text
    assert "url(http" not in text
    assert "://" not in "".join(page.links)
    assert {link.partition(":")[0] for link in page.links if not link.startswith("#")} == {"data"}
    for link in page.links:
        assert not link.startswith("#") or f'id="{link[1:]}"' in text
    (csv_of_study,) = (link for link in page.links if link.startswith("data:text/csv;base64,"))
    assert base64.b64decode(csv_of_study.partition(",")[2]) == (main["out"] / "hificl-table1.csv").read_bytes()


def test_no_script_runs_but_the_pages_own(main: dict[str, Any]) -> None:
    text = (main["out"] / "index.html").read_text()
    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="(.*?)"', text)
    (script,) = re.findall("<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in html.unescape(policy).split("; "))
    assert rules["default-src"] == rules["base-uri"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_a_number_leads_to_its_run_and_a_run_to_a_server_that_others_reach(main: dict[str, Any]) -> None:
    maker, known, cell = main["maker"], main["params"], main["cells"][0]
    text = (main["out"] / "index.html").read_text()
    (place,) = re.findall(rf'<tr id="([^"]+)">(?:(?!</tr>).)*{cell["run_id"]}', text, flags=re.DOTALL)
    values = [one["value"] for one in main["cells"] if (one["row"], one["task"]) == (cell["row"], cell["task"])]
    assert re.search(rf'<a href="#{place}"[^>]*>{statistics.mean(values):.2f}</a>', text)
    assert "hificl ui" in text and "127.0.0.1" not in text
    for uri, linked in (
        ("https://tracking.example", True),
        ("http://127.0.0.1:5000", False),
        ("http://localhost:1", False),
    ):
        there = known.model_copy(update={"tracking": known.tracking.model_copy(update={"uri": uri})})
        _, page = study_page("hificl-table1", there, maker.folder)
        assert (f'href="{uri}/#/runs/{cell["run_id"]}"' in page) is linked
        assert (uri in page) is linked


def test_a_number_whose_task_has_no_score_leads_nowhere(maker: Any) -> None:
    maker.study("mine", [maker.cell("hificl", "mini-vqa", 0) | {"value": None, "metrics": {"chair_s": 0.04}}])
    known = maker.params(mine=maker.definition(paper=None, metrics=["chair_s"]))
    page = Page(study_page("mine", known, maker.folder)[1])
    assert "#" not in page.links


def test_a_study_of_no_paper_speaks_of_none_and_of_its_six_samples(new_maker: Any, tmp_path: Path) -> None:
    maker = new_maker(tmp_path / "evaluations", num_samples=6)
    cells = [maker.cell(row, "mini-vqa", seed) for row in ("hificl", "live") for seed in (0, 1)] + [
        maker.cell("hificl", "mini-coco", 0)
    ]
    maker.study("mine", [cell | {"paper_task": cell["task"]} for cell in cells])
    known = maker.params(mine=maker.definition(title="Ours", paper=None))
    write_study("mine", known, maker.folder, tmp_path)
    index = write_index(known, maker.folder, tmp_path).page.read_text()
    shown = re.sub('<(style|script)>.*?</\\1>|<svg.*?</svg>|href="[^"]*"', "", index, flags=re.DOTALL)
    for text in (shown, (tmp_path / "mine.md").read_text()):
        assert "paper" not in text.lower()
        assert (
            "2 seeds (0, 1) on the same training samples; scored on 6 evaluation samples of mini-vqa, mini-coco."
            in text
        )
        assert "The 95 % interval over seeds and samples reaches at most so far from a number: " in text
    entries = [e for e in load_table("mine", known, maker.folder).entries.values() if e.column.task == "mini-vqa"]
    for entry in entries:
        assert entry.interval and entry.interval[1] - entry.interval[0] > 40
        assert f"95 % interval over seeds and samples: {entry.interval[0]:.2f} to {entry.interval[1]:.2f}" in index
    assert f"number: {max(abs(end - e.value) for e in entries for end in e.interval):.2f} on mini-vqa," in index


def test_a_measured_number_has_no_interval_over_samples(maker: Any) -> None:
    measured = {"measurement": "m.json", "metric": "time", "unit": "times", "value": 2.0}
    maker.study("hificl-figure5", [maker.cell("mimic", "mini-vqa", 0) | measured])
    known = maker.params(**{"hificl-figure5": maker.definition(paper="hificl.figure5_training_cost")})
    (entry,) = load_table("hificl-figure5", known, maker.folder).entries.values()
    assert entry.interval is None
    write_study("hificl-figure5", known, maker.folder, maker.folder.parent)
    assert "One seed (0)." in (maker.folder.parent / "hificl-figure5.md").read_text()


def test_the_page_says_what_has_to_be_known(main: dict[str, Any]) -> None:
    text = (main["out"] / "index.html").read_text()
    for words in (
        "50 of 54 numbers",
        "the loss became NaN at step 3",
        "seeds 0, 1, 2: missing",
        "held out of the training pool",
        "mini-Idefics2 stands for Idefics2-8B-base",
        "0123456789abcdef0123456789abcdef01234567",
        "torch 2.13.0",
        "prefers-color-scheme: dark",
        "10,240",
        "paper 2.2 M",
        "17.0 M",
        "425 GFLOP",
        "768 MiB",
    ):
        assert words in text, words


def test_studies_of_no_paper_show_what_was_found_about_them_alone(maker: Any, tmp_path: Path) -> None:
    maker.study(
        "real-weights", [maker.cell(row, "mini-vqa", seed) for row in ("icl-8", "zero-shot") for seed in (0, 1)]
    )
    known = maker.params(**{"real-weights": maker.definition(paper=None)})
    text = write_index(known, maker.folder, tmp_path).page.read_text()
    assert "Which findings hold here" in text and "1 of 1 are measured" in text
    written = (tmp_path / "findings.md").read_text()
    assert "**: 8 demonstrations are above none on real weights (" in written and "not measured" not in written


def test_a_caption_speaks_of_what_its_figure_shows(maker: Any) -> None:
    losses = [{"epoch": epoch, "ground_truth_loss": 1 / epoch} for epoch in (1, 2)]
    captions = {}
    for study, paper in (("hificl-table1", "hificl.table1_main"), ("mine", None)):
        cells = [maker.cell("hificl", "mini-vqa", 0) | {"epochs": losses}, maker.cell("zero-shot", "mini-vqa", 0)]
        maker.study(study, cells)
        section = study_page(study, maker.params(**{study: maker.definition(paper=paper)}), maker.folder)[1]
        captions[study] = re.findall("<figcaption>(.*?)</figcaption>", section)
    assert captions["hificl-table1"] == [
        "Above: ours. Below, hollow: the paper&#39;s, on axes of their own. One seed. "
        "In bold: HiFICL, with which the others are compared.",
        "One seed.",  # the losses: no paper prints them
    ]
    assert captions["mine"] == ["One seed. In bold: Zero-shot, with which the others are compared.", "One seed."]


def test_the_markdown_has_what_training_cost(main: dict[str, Any]) -> None:
    lines = (main["out"] / "hificl-table1.md").read_text().splitlines()
    (hificl,) = (line for line in lines if line.startswith("| HiFICL"))
    assert hificl.endswith("| 10,240 | 12.1 s | 425 GFLOP | 768 MiB |")
    (zero_shot,) = (line for line in lines if line.startswith("| Zero-shot"))
    assert zero_shot.endswith("| - | - | - | - |")


def test_hostile_text_is_shown_not_run(maker: Any) -> None:
    cells = [
        maker.cell("hificl", "mini-vqa", 0) | {"label": HOSTILE, "task": HOSTILE, "run_id": '"><script>x</script>'},
        maker.cell("icl-8", "mini-vqa", 0)
        | {
            "label": HOSTILE,
            "task": HOSTILE,
            "status": "failed",
            "value": None,
            "error": HOSTILE,
            "searched": {HOSTILE: HOSTILE},
        },
    ]
    maker.study("hificl-table1", cells, title=HOSTILE, provenance={"commit": HOSTILE, "machine": {"cpu": HOSTILE}})
    known = maker.params(**{"hificl-table1": maker.definition(layout="gallery")})
    out = maker.folder.parent / "reports"
    write_study("hificl-table1", known, maker.folder, out)
    text = write_index(known, maker.folder, out).page.read_text()
    page = Page(text)
    assert page.tags.count("script") == 1  # its own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not [link for link in page.links if link.startswith("javascript")]
    markdown = (out / "hificl-table1.md").read_text()
    assert "<script" not in markdown
    (head,) = (line for line in markdown.splitlines() if line.startswith("| method"))
    assert head.replace("\\|", "").count("|") == 3 + 4  # the method, the task, and what training cost
    pictures = list((out / "figures/hificl-table1").glob("*.svg"))
    assert pictures
    for svg in pictures:
        assert not [node for node in ElementTree.parse(svg).iter() if node.tag.endswith("script")]  # noqa: S314
    assert rows_of(out / "hificl-table1.csv")[0]["task"] == HOSTILE


def test_a_paper_reads_the_table_in_as_it_is(main: dict[str, Any]) -> None:
    text = (main["out"] / "hificl-table1.tex").read_text()
    begin, *_, end = lines = text.splitlines()[1:]
    columns = re.fullmatch(r"\\begin\{tabular\}\{@\{\}l(r+)@\{\}\}", begin)
    rows = [line for line in lines if line.endswith(r" \\")]
    assert columns and end == r"\end{tabular}"
    assert {row.count(" & ") for row in rows} == {len(columns[1])}
    methods = {row["method"] for row in rows_of(main["out"] / "hificl-table1.csv")}
    assert len(rows) == 2 + len(methods) and text.count(r"\textbf{") >= 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_takes_a_table_whatever_its_names_hold(maker: Any, tmp_path: Path) -> None:
    special = r"50% of $x_i & #1 {a} \b ~c^d ± × ≤ λ"
    maker.study("hificl-table1", [maker.cell(special, "mini-vqa", seed) for seed in (0, 1)], title=special)
    write_study("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder, tmp_path)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\usepackage{graphicx}\\begin{document}\\input{hificl-table1}"
        "\n\n\\includegraphics[width=8cm]{figures/hificl-table1/bars-mini-idefics2}\\end{document}"
    )
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "paper.pdf").exists(), done.stdout[-2000:]


def test_the_same_inputs_give_the_same_bytes(main: dict[str, Any], tmp_path: Path) -> None:
    forget()
    again = tmp_path / "again"
    write_study("hificl-table1", main["params"], main["maker"].folder, again)
    write_index(main["params"], main["maker"].folder, again)
    files = {file.relative_to(again): file.read_bytes() for file in again.rglob("*") if file.is_file()}
    assert len(files) == 9
    before = {file.relative_to(main["out"]): file.read_bytes() for file in main["out"].rglob("*") if file.is_file()}
    assert files == before


def test_a_studys_metrics_are_by_task_metric_and_method(main: dict[str, Any]) -> None:
    metrics = json.loads((main["out"] / "metrics/hificl-table1.json").read_text())
    rows = {row["method"]: row for row in rows_of(main["out"] / "hificl-table1.csv") if row["task"] == "mini-vqa"}
    assert {row: round(float(rows[row]["value"]), 2) for row in rows} == metrics["mini-vqa"]["accuracy"]
    assert "live" not in metrics["mini-coco"]["CIDEr"]  # it has no number


def test_dvcs_numbers_are_few_and_their_plot_has_all(maker: Any, tmp_path: Path) -> None:
    cells = maker.table("hificl-table1")
    maker.study("hificl-figure7", [maker.cell("hificl", "mini-vqa", 0, vary={"rank": 1})])
    known = maker.params(**{"hificl-table1": maker.definition(), "hificl-figure7": maker.definition()})
    write_numbers(known, maker.folder, tmp_path)
    mine = {(c["task"], c["seed"]): c["value"] for c in cells if c["row"] == "hificl"}
    means = {task: statistics.mean(value for (of, _), value in mine.items() if of == task) for task, _ in mine}
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary == {task: pytest.approx(mean, abs=0.005) for task, mean in means.items()}
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(maker.rows) * 3 - 1 + 1
    assert rows[-1]["method"] == "hificl rank=1" and rows[-1]["study"] == "hificl-figure7"
    (coco,) = (row for row in rows if (row["method"], row["task"]) == ("hificl", "mini-coco"))
    assert (coco["metric"], coco["unit"]) == ("CIDEr", "ratio") and float(coco["value"]) == summary["mini-coco"]


@pytest.mark.parametrize(
    ("rows", "chosen"), [(("mimic", "hificl", "zero-shot"), "hificl"), (("icl-8", "zero-shot"), "zero-shot")]
)
def test_dvcs_number_of_an_own_study_is_of_its_last_row_that_trains(
    maker: Any, tmp_path: Path, rows: tuple[str, ...], chosen: str
) -> None:
    cells = {row: maker.cell(row, "mini-vqa", 0) for row in rows}
    maker.study("mine", list(cells.values()))
    write_numbers(maker.params(mine=maker.definition(paper=None)), maker.folder, tmp_path)
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary == {"mini-vqa": pytest.approx(cells[chosen]["value"], abs=0.005)}


def test_dvcs_numbers_name_methods_and_backbones_where_there_are_several(maker: Any, tmp_path: Path) -> None:
    cells = [maker.cell("hificl", "mini-vqa", 0), maker.cell("hificl", "mini-vqa", 0) | {"backbone": "mini-llava"}]
    maker.study("hificl-table1", cells)
    maker.study("mimic-main", [maker.cell("mimic", "mini-vqa", 0), maker.cell("live", "mini-vqa", 0)])
    known = maker.params(**{"hificl-table1": maker.definition(), "mimic-main": maker.definition()})
    write_numbers(known, maker.folder, tmp_path)
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert {method: list(found) for method, found in summary["mini-vqa"].items()} == {
        "hificl": ["mini-idefics2", "mini-llava"], "mimic": ["mini-idefics2"],
    }  # fmt: skip


def test_the_gallery_shows_answers_side_by_side(maker: Any) -> None:
    maker.study("hificl-figure8", [maker.cell(row, "mini-vqa", 0) for row in ("zero-shot", "hificl")])
    known = maker.params(**{"hificl-figure8": maker.definition(paper=None, layout="gallery")})
    section = study_page("hificl-figure8", known, maker.folder)[1]
    assert section.count('class="right"') >= 4
    assert "word" in section


def test_a_study_with_no_number_still_has_a_report(maker: Any) -> None:
    gone = {"status": "missing", "value": None, "metric": None, "unit": None, "run_id": None, "evaluation": None}
    maker.study("hificl-table1", [maker.cell("hificl", "mini-vqa", 0) | gone])
    known = maker.params(**{"hificl-table1": maker.definition()})
    write_study("hificl-table1", known, maker.folder, maker.folder.parent)
    write_index(known, maker.folder, maker.folder.parent)
    (row,) = rows_of(maker.folder.parent / "hificl-table1.csv")
    assert (row["value"], row["seeds"], row["paper"]) == ("", "0", "72.08")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_text("{"), ["damaged: Expecting"]),
        (lambda file: file.write_text('{"study": "s", "title": "t", "cells": [{"row": 1}]}'), ["cells.0.row"]),
        (lambda file: file.unlink(), ["has not been evaluated", "dvc repro"]),
    ],
)
def test_a_damaged_file_is_named(maker: Any, damage: Any, words: list[str]) -> None:
    maker.table("hificl-table1", seeds=1)
    damage(maker.folder / "studies" / "hificl-table1.json")
    known = maker.params(**{"hificl-table1": maker.definition()})
    with pytest.raises(InputError) as caught:
        write_study("hificl-table1", known, maker.folder, maker.folder.parent)
    assert all(word in str(caught.value) for word in [*words, "hificl-table1.json"])


def test_the_page_shows_what_was_tried_how_much_it_matters_and_what_lies_at_an_end(maker: Any) -> None:
    def searched(row: str, seed: int, scores: dict[float, float]) -> dict[str, Any]:
        best = max(scores, key=scores.__getitem__)
        tried = [{"trial": f"t{rate}", "searched": {"learning_rate": rate}, "selection_score": score}
                 for rate, score in scores.items()]  # fmt: skip
        return maker.cell(row, "mini-vqa", seed) | {"candidates": tried, "searched": {"learning_rate": best}}

    cells = [
        searched("hificl", 0, {0.01: 80.0, 0.1: 84.0, 0.02: 90.0}),
        searched("hificl", 1, {0.01: 82.0, 0.1: 92.0, 0.02: 90.0}),
        searched("mimic", 0, {0.01: 70.0, 0.1: 60.0, 0.02: 65.0}),
        searched("mimic", 1, {0.01: 70.0, 0.1: 60.0, 0.02: 65.0}),
        maker.cell("zero-shot", "mini-vqa", 0),
    ]
    maker.study("hificl-table1", cells)
    known = maker.params(**{"hificl-table1": maker.definition()})
    by_row = {row.line.row: row for row in tried_settings(load_table("hificl-table1", known, maker.folder))}
    hificl, mimic = by_row["hificl"], by_row["mimic"]
    assert hificl.values == [("0.01", 81.0), ("0.02", 90.0), ("0.1", 88.0)]
    assert hificl.chosen == {"0.02": 1, "0.1": 1} and hificl.ends == ["0.1"] and hificl.matters == 9.0
    assert mimic.chosen == {"0.01": 2} and mimic.ends == ["0.01"] and mimic.trials == 3
    index = write_index(known, maker.folder, maker.folder.parent).page.read_text()
    assert "Of 3 trials for each number of every row that was searched, the selection split chose one." in index
    assert "At an end of what was tried, so that more might help: " in index
    assert "MimIC, learning rate = 0.01 (mini-vqa)" in index and "HiFICL, learning rate = 0.1 (mini-vqa)" in index
    assert "<strong>0.02</strong> (1): 90" in index and "<strong>0.1</strong> (1)†: 88" in index
    cells[2]["candidates"].pop()
    cells[3]["candidates"].pop()
    maker.study("hificl-table1", cells)
    write_study("hificl-table1", known, maker.folder, maker.folder.parent)
    assert "Trials for each number: HiFICL 3, MimIC 2." in (maker.folder.parent / "hificl-table1.md").read_text()


def test_a_training_loss_that_rises_between_epochs_is_said_with_its_curve(maker: Any) -> None:
    def trained(row: str, task: str, losses: list[float]) -> dict[str, Any]:
        epochs = [{"epoch": number, "train_loss": loss} for number, loss in enumerate(losses, start=1)]
        return maker.cell(row, task, 0) | {"epochs": epochs}

    maker.study(
        "hificl-table1",
        [
            trained("hificl", "mini-okvqa", [0.485, 0.742, 0.695, 0.406]),
            trained("hificl", "mini-vqa", [0.5, 0.3, 0.329]),  # less than a tenth: the order of samples
            trained("mimic", "mini-okvqa", [0.5, 0.4, 0.3]),
            maker.cell("zero-shot", "mini-okvqa", 0),
        ],
    )
    write_study(
        "hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder, maker.folder.parent
    )
    text = (maker.folder.parent / "hificl-table1.md").read_text()
    rises = next(line for line in text.splitlines() if "The training loss rose between epochs" in line)
    assert "HiFICL (mini-okvqa, seed 0: 0.485, 0.742, 0.695, 0.406)." in rises
    assert "mini-vqa" not in rises and "MimIC" not in rises
