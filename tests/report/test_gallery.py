from __future__ import annotations

from typing import Any

from pipeline.report import load_table
from pipeline.report.evaluations import Prediction, read_evaluation
from pipeline.report.gallery import SAMPLES, gallery, marked


def test_the_gallery_shows_where_the_reference_row_is_best_and_worst(maker: Any) -> None:
    cells = [maker.cell(row, "mini-vqa", 0) for row in ("zero-shot", "hificl")]
    maker.study("hificl-figure8", cells)
    known = maker.params(**{"hificl-figure8": maker.definition(paper=None, layout="gallery")})
    table = load_table("hificl-figure8", known, maker.folder)
    assert table.reference == "hificl"
    other, own = (
        {str(one.sample_id): one.score or 0.0 for one in found.predictions}
        for found in (read_evaluation(cell["evaluation"], maker.folder) for cell in cells)
        if found
    )
    shown = gallery(table, maker.folder)
    assert shown is not None
    leads = [own[name] - other[name] for name in (sample["id"].split()[-1] for sample in shown["samples"])]
    every = sorted(own[name] - other[name] for name in own)
    half = SAMPLES // 2
    assert leads[:half] == every[::-1][:half]
    assert leads[half:] == every[:half]
    assert len({sample["id"] for sample in shown["samples"]}) == SAMPLES


def test_words_that_name_what_is_not_there_are_marked() -> None:
    caption = Prediction(sample_id=1, prediction="A Dog and a hot dog", hallucinated=["dog", "hot dog"])
    assert marked(caption) == [("A ", False), ("Dog", True), (" and a ", False), ("hot dog", True)]
    assert marked(Prediction(sample_id=1, prediction="a dog")) == [("a dog", False)]
