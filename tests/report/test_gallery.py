from __future__ import annotations

import io
import json
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from pipeline.records.evaluation import Evaluations, Prediction
from pipeline.report import load_table, write_index
from pipeline.report.answers import SAMPLES, answer_table, marked_pieces
from pipeline.scores.chair import chair_scores


def test_the_gallery_shows_where_the_reference_row_is_best_and_worst(maker: Any) -> None:
    cells = [maker.cell(row, "mini-vqa", 0) for row in ("zero-shot", "hificl")]
    maker.study("hificl-figure8", cells)
    known = maker.params(**{"hificl-figure8": maker.definition(paper=None, layout="gallery")})
    table = load_table("hificl-figure8", known, maker.folder)
    assert table.reference == "hificl"
    other, own = (
        {str(one.sample_id): one.score or 0.0 for one in found.predictions}
        for found in (Evaluations(maker.folder).read(cell["evaluation"]) for cell in cells)
        if found
    )
    shown = answer_table(table, maker.folder)
    assert shown is not None
    leads = [own[name] - other[name] for name in (sample.id.split()[-1] for sample in shown.samples)]
    every = sorted(own[name] - other[name] for name in own)
    half = SAMPLES // 2
    assert leads[:half] == every[::-1][:half]
    assert leads[half:] == every[:half]
    assert len({sample.id for sample in shown.samples}) == SAMPLES


def test_words_that_name_what_is_not_there_are_marked() -> None:
    caption = Prediction(sample_id=1, prediction="A Dog and a hot dog", hallucinated=["dog", "hot dog"])
    assert marked_pieces(caption) == [("A ", False), ("Dog", True), (" and a ", False), ("hot dog", True)]
    assert marked_pieces(Prediction(sample_id=1, prediction="a dog")) == [("a dog", False)]
    assert marked_pieces(Prediction(sample_id=1, prediction="")) == [("", False)]
    several = "Two dogs, hot dogs and wine glasses; a baby bird."
    wrong = [row[0] for row in hallucinated(several)]
    assert wrong == ["dog", "hot dog", "wine glass", "bird"]
    pieces = marked_pieces(Prediction(sample_id=1, prediction=several, hallucinated=wrong))
    assert [text for text, bad in pieces if bad] == ["dogs", "hot dogs", "wine glasses", "baby bird"]
    assert "".join(text for text, _ in pieces) == several


def hallucinated(caption: str) -> list[list[str]]:
    return chair_scores({1: caption}, {1: set()}).sentences[0].mscoco_hallucinated_words


def test_the_page_shows_image_question_references_and_every_answer(maker: Any, tmp_path: Any) -> None:
    """Of a question whose image stands in a Parquet shard, and of captions of mini-coco with a word too many."""
    buffer = io.BytesIO()
    Image.new("RGB", (900, 600), (200, 30, 30)).save(buffer, format="PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": cell}]), tmp_path / "test-0.parquet")
    cells = [maker.cell(row, task, 0) for row in ("zero-shot", "hificl") for task in ("mini-vqa", "mini-coco")]
    for cell in cells:
        path = maker.folder / f"{cell['evaluation']}.json"
        record = json.loads(path.read_text())
        for row in record["predictions"]:
            row.update(image=str(tmp_path / "test-0.parquet#0/image"), references=["a red wall", "a wall"])
            if cell["task"] == "mini-vqa":
                row.update(question=f"What is <{row['sample_id']}>?", prediction=f"{cell['row']} says")
            else:
                row.update(prediction=f"{cell['row']} sees two dogs", hallucinated=["dog"])
        path.write_text(json.dumps(record))
    maker.study("hificl-figure8", cells)
    known = maker.params(**{"hificl-figure8": maker.definition(paper=None, layout="gallery")})
    html = write_index(known, maker.folder, tmp_path / "reports").page.read_text(encoding="utf-8")
    shown = html[html.index('class="gallery"') :]
    assert shown.count("data:image/jpeg;base64,") == 2 * SAMPLES
    assert shown.count("hificl says") == shown.count("zero-shot says") == shown.count("What is &lt;") // 2 == SAMPLES
    assert shown.count('sees two <mark title="not in the image">dogs</mark>') == 2 * SAMPLES
    assert shown.count("a red wall; a wall") == 2 * SAMPLES
