"""The papers' findings, judged on made-up numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load
from pipeline.report import load_table, papers, write_index
from pipeline.report.findings import FAILS, HOLDS, OPEN, UNDECIDED, check_claims, claims

ROOT = Path(__file__).resolve().parents[2]


def test_every_claim_names_rows_of_its_study() -> None:
    studies = load(ROOT / "params.yaml").studies
    for claim in claims():
        study = studies[claim.study]
        assert {*claim.above, *claim.below} <= set(study.methods), claim
        assert claim.metric is None or claim.metric in study.metrics
        assert all(value in study.vary[axis] for axis, value in claim.at.items())
        assert set(claim.backbones) <= set(study.backbones)
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


SEEDS = range(5)
PAPER_TASKS = {"mini-vqa": "vqav2", "mini-okvqa": "okvqa", "mini-coco": "coco"}


@pytest.fixture
def judged(maker: Any):
    def judge(study: str, definition: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
        maker.study(study, cells)
        known = maker.params(**{study: maker.definition(**definition)})
        table = load_table(study, known, maker.folder)
        write_index(known, maker.folder, maker.folder.parent)
        return {checked.claim.claim: checked for checked in check_claims([table], maker.folder)}

    return judge


@pytest.fixture
def over_seeds(maker: Any):
    def cells(
        row: str, task: str, value: float, off: float = 0.1, seeds: int = len(SEEDS), **more: Any
    ) -> list[dict[str, Any]]:
        """Return a row's cells, each of one number alone, whose deviations over seeds are `off` times these."""
        shape = {5: (-1.0, 0.5, 0.8, -0.6, 0.3), 1: (0.0,)}[seeds]
        turn = sum(map(ord, f"{row}{more.get('vary')}")) % seeds  # rows and points differ in where they deviate
        return [
            maker.cell(row, task, seed)
            | {"evaluation": None, "paper_task": PAPER_TASKS[task]}
            | {"value": value + off * shape[(seed + turn) % seeds]}
            | more
            for seed in range(seeds)
        ]

    return cells


TABLE_1 = {"zero-shot": (20, 20), "icl-8": (50, 50), "lora-r16": (70, 70), "mimic": (80, 60), "hificl": (60, 65)}


def of_table_1(over_seeds: Any, rows: dict[str, tuple[float, float]], **more: Any) -> list[dict[str, Any]]:
    return [
        cell
        for row, values in rows.items()
        for task, value in zip(("mini-vqa", "mini-okvqa"), values, strict=True)
        for cell in over_seeds(row, task, value, **more)
    ]


def test_a_claim_holds_everywhere_or_fails_somewhere(
    maker: Any, judged: Any, over_seeds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged("hificl-table1", {}, of_table_1(over_seeds, TABLE_1))
    assert found["In-context learning is above zero-shot"].verdict == HOLDS
    assert found["HiFICL is above MimIC"].verdict == FAILS  # it is on one task of two
    assert found["HiFICL is above LoRA at rank 16"].verdict == FAILS
    assert found["Methods that train are above in-context learning"].verdict == HOLDS
    assert found["A teacher lowers HiFICL"].verdict == found["32 demonstrations are below 8"].verdict == OPEN
    details = found["HiFICL is above MimIC"].details
    assert len(details) == 2 and "against MimIC 80.00" in details[0] and "5 seeds" in details[0]
    known = maker.params(**{"hificl-table1": maker.definition()})
    index = write_index(known, maker.folder, maker.folder.parent)
    capsys.readouterr()
    index.say(["hificl-figure5"])
    out, said = capsys.readouterr()
    assert out == "" and said.split() == ["report:", str(maker.folder.parent / "index.html")]
    index.say(["hificl-table1"])
    out, said = capsys.readouterr()
    assert out == "" and "fails: HiFICL is above MimIC (HiFICL)" in said and OPEN not in said
    assert said.index("mini-okvqa") < said.index("fails: HiFICL") < said.index("report: ")
    page = (maker.folder.parent / "index.html").read_text()
    assert "Which of the papers" in page and '<strong class="bad">fails</strong>' in page
    text = (maker.folder.parent / "findings.md").read_text()
    assert "**fails**: HiFICL is above MimIC (HiFICL, `hificl-table1`; p < 0.001)" in text
    assert "smallest effect of interest" in text and "Holm" in text


def test_one_seed_decides_nothing_whatever_its_sign(maker: Any, judged: Any, over_seeds: Any) -> None:
    found = judged("hificl-table1", {}, of_table_1(over_seeds, TABLE_1, seeds=1))
    measured = [checked for checked in found.values() if checked.verdict != OPEN]
    assert len(measured) == 4 and {checked.verdict for checked in measured} == {UNDECIDED}
    of_samples = judged("hificl-table1", {}, [maker.cell(row, "mini-vqa", 0) for row in ("icl-8", "zero-shot")])
    known = of_samples["In-context learning is above zero-shot"]
    assert known.verdict == UNDECIDED and "95 % interval +" in known.details[0]
    assert "(one seed, which decides nothing, 60 samples)" in known.details[0]


@pytest.mark.parametrize(
    ("gap", "off", "smallest", "verdict"),
    [
        (0.6, 0.01, {}, HOLDS),  # half a point is asked by default
        (0.4, 0.01, {}, FAILS),  # above MimIC, and by less than is of interest
        (0.4, 0.01, {"vqav2": 0.3}, HOLDS),
        (0.6, 0.01, {"vqav2": 0.7}, FAILS),
        (0.6, 1.0, {}, UNDECIDED),
        (-0.1, 1.0, {}, UNDECIDED),  # of no sign
        (-3.0, 0.1, {}, FAILS),
        (0.5, 0.0, {}, UNDECIDED),  # at the bound itself, without error
    ],
)
def test_the_verdict_comes_from_the_interval_and_the_smallest_effect(
    judged: Any, over_seeds: Any, gap: float, off: float, smallest: dict[str, float], verdict: str
) -> None:
    cells = [*over_seeds("hificl", "mini-vqa", 60 + gap, off), *over_seeds("mimic", "mini-vqa", 60, off)]
    found = judged("hificl-table1", {"tasks": ["vqav2"], "smallest_effect": smallest}, cells)
    assert found["HiFICL is above MimIC"].verdict == verdict


def test_each_further_claim_asks_more_of_the_others(judged: Any, over_seeds: Any) -> None:
    two = [*over_seeds("hificl", "mini-vqa", 61.05, 0.4), *over_seeds("mimic", "mini-vqa", 60, 0.1)]
    alone = judged("hificl-table1", {}, two)["HiFICL is above MimIC"]
    assert alone.verdict == HOLDS and 0.01 < alone.odds < 0.05
    more = [cell for row in ("live", "lora-r16") for cell in over_seeds(row, "mini-vqa", 61, 0.9)]
    among = judged("hificl-table1", {}, [*two, *more])["HiFICL is above MimIC"]
    assert among.verdict == UNDECIDED and among.odds == pytest.approx(3 * alone.odds)


def test_margins_ratios_and_bounds(judged: Any, over_seeds: Any) -> None:
    values = {"zero-shot": (20, 30, 1.0), "icl-8": (50, 50, 1.9), "hificl": (70, 97.5, 3.0), "lora-r16": (60, 97, 3.0)}
    cells = [
        cell
        for row, triple in values.items()
        for task, value in zip(PAPER_TASKS, triple, strict=True)
        for cell in over_seeds(row, task, value, 0.01)
    ]
    definition = {"tasks": ["vqav2", "okvqa", "coco"]}
    found = judged("miniature-comparison", definition, cells)
    verdicts = {claim: checked.verdict for claim, checked in found.items()}
    assert verdicts["8 demonstrations bring at least 25 points"] == FAILS  # 20 on one task
    assert verdicts["8 demonstrations at least double CIDEr-D"] == FAILS
    assert verdicts["HiFICL is at least 15 points above 8-shot"] == HOLDS
    assert verdicts["There is head room, the best method stays below 97 %"] == FAILS
    assert len(found["HiFICL is at least 15 points above 8-shot"].details) == 2
    assert "(the latter times 2): -0.1000" in found["8 demonstrations at least double CIDEr-D"].details[0]


def test_a_row_is_judged_along_its_axis(judged: Any, over_seeds: Any) -> None:
    sizes = (100, 300, 1000)
    courses = {"hificl": (20, 70, 80), "lora-r16": (60, 70, 80), "mimic": (60, 90, 80), "live": (60, 70.1, 70)}
    cells = [
        cell
        for row, values in {**courses, "icl-8": (50, 50, 50)}.items()
        for size, value in zip(sizes, values, strict=True)
        for cell in over_seeds(row, "mini-vqa", value, vary={"num_train_samples": size})
    ]
    found = judged("miniature-sizes", {"tasks": ["vqav2"], "vary": {"num_train_samples": list(sizes)}}, cells)
    rises = {row: found[f"{row} rises with the number of samples"] for row in ("LoRA", "HiFICL", "MimIC", "LIVE")}
    assert rises["LoRA"].verdict == HOLDS and "no rise" not in rises["LoRA"].details[0]
    assert rises["LIVE"].verdict == HOLDS  # a fall below the smallest effect is none
    assert "; no rise to num_train_samples 1000; from end to end +10.00" in rises["LIVE"].details[0]
    assert rises["MimIC"].verdict == FAILS and "; no rise to num_train_samples 1000" in rises["MimIC"].details[0]
    assert found["HiFICL passes 8-shot"].verdict == HOLDS
    assert "from num_train_samples 300 on" in found["HiFICL passes 8-shot"].details[0]


def test_a_course_of_shots_has_to_rise_at_each_step(judged: Any, over_seeds: Any) -> None:
    for last, verdict in ((56, HOLDS), (54, FAILS), (55.3, FAILS)):
        cells = [
            cell
            for shots, value in ((1, 40), (4, 55), (8, last))
            for cell in over_seeds("icl-k", "mini-vqa", value, 0.02, vary={"num_shots": shots})
        ]
        found = judged("miniature-shots", {"tasks": ["vqav2"], "vary": {"num_shots": [1, 4, 8]}}, cells)
        assert found["Every further demonstration helps"].verdict == verdict


def test_what_is_counted_needs_no_seeds_and_what_is_timed_does(maker: Any, judged: Any) -> None:
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
    assert found["Training costs MimIC more time than HiFICL"].verdict == UNDECIDED
    assert "one measurement of each" in found["Training costs MimIC more time than HiFICL"].details[0]
    assert found["Training costs MimIC more FLOPs"].verdict == FAILS
    assert found["Training costs MimIC more memory"].verdict == HOLDS
    repeated = [cell | {"seed": seed, "value": cell["value"] * lift} for cell in cells
                for seed, lift in enumerate((1.0, 1.02, 0.99))]  # fmt: skip
    found = judged("hificl-figure5", definition, repeated)
    assert found["Training costs MimIC more time than HiFICL"].verdict == HOLDS


@pytest.mark.parametrize(
    ("vqa", "coco", "off", "verdict"),
    [
        ((70, 80), (1.3, 1.2), 0.001, HOLDS),
        ((70, 80), (1.3, 1.2), 1.0, UNDECIDED),  # the best ranks differ, by chance for all one knows
        ((70, 80), (1.2, 1.3), 0.001, FAILS),
        ((70, 80), (1.3, 1.299), 0.0001, FAILS),  # they differ, and 8 is good enough for both
    ],
)
def test_tasks_want_different_ranks_where_each_is_better_on_its_own(
    judged: Any, over_seeds: Any, vqa: tuple[float, float], coco: tuple[float, float], off: float, verdict: str
) -> None:
    cells = [
        cell
        for task, row in (("mini-vqa", vqa), ("mini-coco", coco))
        for rank, value in zip((4, 8), row, strict=True)
        for cell in over_seeds("hificl", task, value, off * (1 + (rank == 4)), vary={"rank": rank})
    ]
    known = judged("hificl-figure7", {"paper": "hificl.figure7", "layout": "curve", "vary": {"rank": [4, 8]}}, cells)
    found = known["Tasks want different ranks"]
    assert found.verdict == verdict
    if verdict == HOLDS:
        assert "rank 8 (paper 8)" in found.details[0] and "rank 4 (paper 4)" in found.details[0]


def test_what_a_source_says_of_no_advantage_holds_without_one(judged: Any, over_seeds: Any) -> None:
    claim = "HiFICL has no clear advantage over MimIC on Idefics1"
    for gap, verdict in ((0.1, HOLDS), (-2.0, HOLDS), (2.0, FAILS)):
        rows = [*over_seeds("hificl", "mini-vqa", 60 + gap), *over_seeds("mimic", "mini-vqa", 60)]
        one = [cell | {"paper_backbone": "idefics-9b"} for cell in rows]
        found = judged("hificl-table7", {"paper": "hificl.table7_backbones", "backbones": ["idefics-9b"]}, one)
        assert found[claim].verdict == verdict
        assert found["HiFICL is above MimIC on LLaVA-v1.6 and LLaVA-OneVision"].verdict == OPEN


def test_a_smallest_effect_is_of_a_task_or_metric_of_the_study(maker: Any) -> None:
    with pytest.raises(ValueError, match="smallest_effect names 'vqa', which is no task or metric"):
        maker.params(x=maker.definition(smallest_effect={"vqa": 1.0}))


def test_losses_are_drawn_where_epochs_are_known(maker: Any) -> None:
    from pipeline.report import figures

    epochs = [{"epoch": e, "ground_truth_loss": 3.0 / e, "train_loss": 3.0 / e} for e in (1, 2, 3)]
    cells = [maker.cell(row, "mini-vqa", seed) | {"epochs": epochs} for row in ("mimic", "hificl") for seed in (0, 1)]
    maker.study("hificl-table1", [*cells, maker.cell("zero-shot", "mini-vqa", 0)])
    table = load_table("hificl-table1", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    ((name, drawing),) = figures.draw_losses(table).items()
    svg, words = drawing.svg, drawing.words
    assert name == "loss-mini-idefics2" and "currentColor" in svg
    assert "MimIC" in words and "Zero-shot" not in words
