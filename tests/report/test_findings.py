"""The papers' findings, judged on made-up numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load
from pipeline.report import load_table, papers, write_index
from pipeline.report.findings import FAILS, HOLDS, OPEN, PARTLY, check_claims, claims

ROOT = Path(__file__).resolve().parents[2]


def test_every_claim_names_rows_of_its_study() -> None:
    studies = load(ROOT / "params.yaml").studies
    for claim in claims():
        study = studies[claim.study]
        assert {*claim.above, *claim.below} <= set(study.methods), claim
        assert claim.metric is None or claim.metric in study.metrics
        assert all(value in study.vary[axis] for axis, value in claim.at.items())
        axes = {claim.best_over, claim.rising, claim.rising_overall, claim.passes} - {None}
        assert axes <= set(study.vary) and (claim.row in study.methods) == bool(axes or claim.spread)
        assert set(claim.tasks) <= set(study.tasks)


def test_every_study_of_the_papers_is_there_and_every_printed_row_has_one() -> None:
    studies = load(ROOT / "params.yaml", profile="real").studies  # without what the miniature leaves out
    tables = {"hificl": "table1 table2 table3 table6 table7 table8 figure4 figure5 figure6 figure7 figure8 figure10",
              "mimic": "main table8 table9 table10 table11 table12 figure4 figure5 figure7"}  # fmt: skip
    assert {f"{paper}-{name}" for paper, names in tables.items() for name in names.split()} <= set(studies)
    printed = papers._papers()
    for name, study in studies.items():
        paper, _, table = (study.paper or "").partition(".")
        rows = printed[paper].tables.get(table) if paper else None
        if rows is None or rows.by_metric or rows.metric == "speed_up":
            continue
        for backbone, printed_rows in rows.rows.items():
            known = {method.paper or row for row, method in study.methods.items()
                    if backbone in (method.backbones or study.backbones)}  # fmt: skip
            assert set(printed_rows) <= known, (name, backbone)


@pytest.fixture
def judged(maker: Any):
    def judge(study: str, definition: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
        maker.study(study, cells)
        known = maker.params(**{study: maker.definition(**definition)})
        table = load_table(study, known, maker.folder)
        write_index(known, maker.folder, maker.folder.parent)
        return {checked.claim.claim: checked for checked in check_claims([table], maker.folder)}

    return judge


def test_a_claim_holds_on_every_task_on_some_or_on_none(
    maker: Any, judged: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"zero-shot": (20, 20), "icl-8": (50, 50), "lora-r16": (70, 70), "mimic": (80, 60), "hificl": (60, 65)}
    cells = [
        maker.cell(row, task, 0) | {"value": value}
        for row, pair in values.items()
        for task, value in zip(("mini-vqa", "mini-okvqa"), pair, strict=True)
    ]
    found = judged("hificl-table1", {}, cells)
    assert found["In-context learning is above zero-shot"].verdict == HOLDS
    assert found["HiFICL is above MimIC"].verdict == PARTLY
    assert found["HiFICL is above LoRA at rank 16"].verdict == FAILS
    assert found["A teacher lowers HiFICL"].verdict == OPEN
    details = found["HiFICL is above MimIC"].details
    assert len(details) == 2 and "60.00 against MimIC 80.00" in details[0]
    known = maker.params(**{"hificl-table1": maker.definition()})
    index = write_index(known, maker.folder, maker.folder.parent)
    capsys.readouterr()
    index.say(["hificl-figure5"])
    out, said = capsys.readouterr()
    assert out == "" and said.split() == ["report:", str(maker.folder.parent / "index.html")]
    index.say(["hificl-table1"])
    out, said = capsys.readouterr()
    assert out == "" and "holds in part: HiFICL is above MimIC (HiFICL)" in said and OPEN not in said
    assert said.index("mini-okvqa") < said.index("holds in part") < said.index("report: ")
    page = (maker.folder.parent / "index.html").read_text()
    assert "Which of the papers" in page and "does not hold" in page
    assert "**holds in part**: HiFICL is above MimIC" in (maker.folder.parent / "findings.md").read_text()


def test_margins_ratios_and_bounds(maker: Any, judged: Any) -> None:
    values = {"zero-shot": (20, 30, 1.0), "icl-8": (50, 50, 1.9), "hificl": (66, 97.5, 3.0), "lora-r16": (60, 97, 3.0)}
    tasks = (("mini-vqa", "vqav2"), ("mini-okvqa", "okvqa"), ("mini-coco", "coco"))
    cells = [
        maker.cell(row, task, 0) | {"value": value, "paper_task": paper}
        for row, triple in values.items()
        for (task, paper), value in zip(tasks, triple, strict=True)
    ]
    definition = {"tasks": ["vqav2", "okvqa", "coco"]}
    found = judged("miniature-comparison", definition, cells)
    verdicts = {claim: one.verdict for claim, one in found.items()}
    assert verdicts["8 demonstrations bring at least 25 points"] == PARTLY
    assert verdicts["8 demonstrations at least double CIDEr-D"] == FAILS
    assert verdicts["HiFICL is at least 15 points above 8-shot"] == HOLDS
    assert verdicts["There is head room, the best method stays below 97 %"] == PARTLY
    assert len(found["HiFICL is at least 15 points above 8-shot"].details) == 2


def test_a_row_is_judged_along_its_axis(maker: Any, judged: Any) -> None:
    sizes = (100, 300, 1000)
    lifts = {"hificl": (-0.6, 0.0, 0.0), "lora-r16": (-0.6, -0.3, 0.0), "mimic": (-0.5, 0.2, -0.2), "live": (0, 0, 0)}
    cells = [
        maker.cell(row, "mini-vqa", seed, vary={"num_train_samples": size}, lift=lift)
        for row, values in lifts.items()
        for size, lift in zip(sizes, values, strict=True)
        for seed in (0, 1, 2)
    ]
    for cell in cells:  # one that falls at its end, by nothing
        if cell["row"] == "live":
            cell["value"] = {100: 50.0, 300: 60.01, 1000: 60.0}[cell["vary"]["num_train_samples"]]
    cells += [maker.cell("icl-8", "mini-vqa", 0) | {"value": 50, "vary": {"num_train_samples": n}} for n in sizes]
    found = judged("miniature-sizes", {"tasks": ["vqav2"], "vary": {"num_train_samples": list(sizes)}}, cells)
    rises = {row: found[f"{row} rises with the number of samples"] for row in ("LoRA", "HiFICL", "MimIC", "LIVE")}
    assert rises["LoRA"].verdict == HOLDS and "no rise" not in rises["LoRA"].details[0]
    assert rises["LIVE"].verdict == HOLDS
    assert "; no rise to num_train_samples 1000 (within chance over samples)" in rises["LIVE"].details[0]
    assert rises["MimIC"].verdict == FAILS
    assert "; no rise to num_train_samples 1000 (clear)" in rises["MimIC"].details[0]
    assert found["HiFICL passes 8-shot"].verdict == HOLDS
    assert "from num_train_samples 300 on" in found["HiFICL passes 8-shot"].details[0]


def test_a_course_of_shots_has_to_rise_at_each_step(maker: Any, judged: Any) -> None:
    for last, verdict in ((56, HOLDS), (54, FAILS)):
        cells = [
            maker.cell("icl-k", "mini-vqa", 0) | {"value": value, "vary": {"num_shots": shots}}
            for shots, value in ((1, 40), (4, 55), (8, last))
        ]
        found = judged("miniature-shots", {"tasks": ["vqav2"], "vary": {"num_shots": [1, 4, 8]}}, cells)
        assert found["Every further demonstration helps"].verdict == verdict


def test_costs_are_better_where_they_are_lower_and_the_best_rank_is_named(maker: Any, judged: Any) -> None:
    costs = {
        "hificl": {"time": 1.0, "flops": 1.0, "gpu_memory": 1.0},
        "mimic": {"time": 3.0, "flops": 0.5, "gpu_memory": 1.5},
    }
    cells = [
        maker.cell(row, "mini-vqa", 0)
        | {"metric": "time", "unit": "times", "value": numbers["time"], "metrics": numbers, "measurement": "m.json"}
        for row, numbers in costs.items()
    ]
    definition = {"paper": "hificl.figure5_training_cost", "metrics": ["flops", "gpu_memory"]}
    found = judged("hificl-figure5", definition, cells)
    assert found["Training costs MimIC more time than HiFICL"].verdict == HOLDS
    assert found["Training costs MimIC more FLOPs"].verdict == FAILS
    ranks = [
        maker.cell("hificl", task, 0, vary={"rank": rank}) | {"value": value}
        for task, row in (("mini-vqa", (70, 80)), ("mini-coco", (1.3, 1.2)))
        for rank, value in zip((4, 8), row, strict=True)
    ]
    found = judged("hificl-figure7", {"paper": "hificl.figure7", "layout": "curve", "vary": {"rank": [4, 8]}}, ranks)
    (vqa, coco) = found["The best rank depends on the task"].details
    assert "rank 8 (paper 8)" in vqa and "rank 4 (paper 4)" in coco


def test_losses_are_drawn_where_epochs_are_known(maker: Any) -> None:
    from pipeline.report import figures

    epochs = [{"epoch": e, "ground_truth_loss": 3.0 / e, "train_loss": 3.0 / e} for e in (1, 2, 3)]
    cells = [maker.cell(row, "mini-vqa", seed) | {"epochs": epochs} for row in ("mimic", "hificl") for seed in (0, 1)]
    maker.study("hificl-table1", [*cells, maker.cell("zero-shot", "mini-vqa", 0)])
    table = load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    ((name, (svg, words)),) = figures.draw_losses(table).items()
    assert name == "loss-mini-idefics2" and "currentColor" in svg
    assert "MimIC" in words and "Zero-shot" not in words
