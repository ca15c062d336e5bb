from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from pipeline.core.errors import InputError
from pipeline.report import papers

I2 = "idefics2-8b-base"


@pytest.mark.parametrize(
    ("path", "backbone", "row", "task", "metric", "value", "unit"),
    [
        ("hificl.table1_main", I2, "hificl", "coco", None, 1.2951, "ratio"),
        ("mimic.main", I2, "mimic", "coco", None, 132.87, "percent"),
        ("hificl.table7_backbones", "idefics-9b", "hificl", "coco", None, 115.21, "percent"),
        ("hificl.table7_backbones", "llava-v1.6-mistral-7b", "hificl", "coco", None, 1.3192, "ratio"),
        ("hificl.table2_ablation", I2, "hificl-alpha1", "okvqa", None, 58.51, None),
        ("hificl.table3_hallucination", I2, "hificl", "coco", "CHAIRs", 3.2, "percent"),
        ("hificl.table3_hallucination", I2, "hificl", "coco", None, None, "ratio"),
        ("hificl.table1_main", I2, "zero-shot", "params_m", None, None, None),
        ("mimic.table9_8000_samples", I2, "live", "coco", None, None, "percent"),
        ("mimic.table11_latent_distance", "idefics-9b", "mimic", "vqav2", "latent_distance", 30.17, "l2"),
        ("mimic.table11_latent_distance", "idefics-9b", "mimic", "vqav2", None, None, None),
        ("hificl.figure5_training_cost", I2, "mimic", "vqav2", "flops", 14.3, "times"),
        ("hificl.figure5_training_cost", I2, "hificl", "vqav2", "flops", None, "times"),
        ("hificl.table1_main", "another", "hificl", "coco", None, None, "ratio"),
        ("hificl.figure4", I2, "hificl", "coco", None, None, "ratio"),
    ],
)
def test_figures_and_units(path, backbone, row, task, metric, value, unit) -> None:  # noqa: PLR0913, ANN001
    assert papers.printed_value(path, backbone, row, task, metric) == value
    assert papers.unit(path, "hificl-x", backbone, task, metric) == unit


def test_a_study_without_a_table_keeps_its_papers_habit() -> None:
    assert papers.unit(None, "hificl-figure4", I2, "coco") == "ratio"
    assert papers.unit(None, "mimic-figure4", I2, "coco") == "percent"
    assert papers.unit(None, "mine", I2, "coco") is None


@pytest.mark.parametrize(("path", "words"), [("hificl.table1", "table1_main"), ("hifcl.x", "hificl")])
def test_an_unknown_table_suggests_the_nearest(path: str, words: str) -> None:
    with pytest.raises(InputError, match=f"Did you mean '{words}'"):
        papers.paper_table(path)


def test_units_are_converted_where_they_are_parts_of_one_whole() -> None:
    assert papers.convert(1.2951, "fraction", "percent") == pytest.approx(129.51)
    assert papers.convert(81.0, "percent", "ratio") == pytest.approx(0.81)
    assert papers.convert(30.17, "l2", "percent") == 30.17
    assert papers.convert(1.0, "fraction", None) == 1.0


def test_every_transcribed_figure_is_here() -> None:
    file = Path(os.environ.get("HIFICL_SHARED_DATA", "../shared/data")).parent / "papers" / "results.yaml"
    if not file.is_file():
        pytest.skip("the transcription is not here")
    ours = yaml.safe_load(papers._FIGURES.read_text())
    for paper, tables in yaml.safe_load(file.read_text()).items():
        for name, table in tables.items():
            assert sorted(numbers(table)) == sorted(numbers(ours[paper]["tables"][name]["rows"])), name


def numbers(node: object) -> list[float]:
    if isinstance(node, dict):
        return [number for value in node.values() for number in numbers(value)]
    if isinstance(node, list):
        return [number for value in node for number in numbers(value)]
    return [float(node)] if isinstance(node, int | float) else []
