"""Answers of the methods side by side on the same samples, chosen where they differ."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from pipeline.data.images import open_image
from pipeline.errors import InputError
from pipeline.report import papers
from pipeline.report.evaluations import Prediction, read_evaluation
from pipeline.report.tables import Line, Table
from pipeline.scores.chair import mentions

SAMPLES = 4  # a task
_MAX_SIDE = 320  # pixels: the page carries its images itself


def gallery(table: Table, evaluations: Path) -> dict[str, Any] | None:
    """Return the rows' names and the samples with each row's answer; None where there is nothing to show.

    Half of the samples are those on which the study's reference row is furthest above the others' mean, half those on
    which it is furthest below: its best and its worst. Ties go by the order of the ids.
    """
    groups = table.groups()
    if not groups:
        return None
    lines = groups[0][1]
    samples: list[dict[str, Any]] = []
    for column in table.columns:
        if column.metric is None:
            answers = [(line, _answers(table, line, column, evaluations)) for line in lines]
            known = [(line, found) for line, found in answers if found]
            samples += _samples(known, lines, evaluations, papers.label("tasks", column.task), table.reference)
    return {"rows": [line.title for line in lines], "samples": samples} if samples else None


def _answers(table: Table, line: Line, column: Any, evaluations: Path) -> dict[str, Prediction]:
    cell = next((one for one in table.entries[line, column].done if one.evaluation), None)
    found = read_evaluation(cell.evaluation, evaluations) if cell and cell.evaluation else None
    return {str(one.sample_id): one for one in found.predictions} if found else {}


def _samples(
    answers: list[tuple[Line, dict[str, Prediction]]],
    lines: list[Line],
    evaluations: Path,
    task: str,
    reference: str | None,
) -> list[dict[str, Any]]:
    if not answers:
        return []
    by_line = dict(answers)
    shared = set.intersection(*(set(found) for found in by_line.values()))

    def lead(sample: str) -> float:
        own = [found[sample].score or 0.0 for line, found in by_line.items() if line.row == reference]
        others = [found[sample].score or 0.0 for line, found in by_line.items() if line.row != reference]
        return sum(own) / len(own) - sum(others) / len(others) if own and others else 0.0

    best_first = sorted(shared, key=lambda sample: (-lead(sample), len(sample), sample))
    worst_first = sorted(shared, key=lambda sample: (lead(sample), len(sample), sample))
    half = SAMPLES // 2
    worst = [sample for sample in worst_first if sample not in best_first[:half]][:half]
    out = []
    for sample in best_first[:half] + worst:
        every = [found[sample] for found in by_line.values()]
        best = max((one.score or 0.0 for one in every), default=0.0)
        image = next((one.image for one in every if one.image), None)
        question = next((one.question for one in every if one.question), None)
        references = next((one.references for one in every if one.references), [])
        out.append(
            {
                "id": f"{task} {sample}",
                "question": question,
                "references": "; ".join(dict.fromkeys(references)),
                "image": _data_uri(evaluations.parent / image) if image else None,
                "words": question or f"Image of sample {sample}",
                "answers": [
                    {
                        "parts": marked(by_line[line][sample]),
                        "right": (by_line[line][sample].score or 0.0) == best > 0,
                    }
                    if line in by_line
                    else {"parts": [], "right": False}
                    for line in lines
                ],
            }
        )
    return out


def marked(prediction: Prediction) -> list[tuple[str, bool]]:
    """Return an answer's text in pieces, each with whether it names what its image does not show (CHAIR)."""
    text, pieces, at = prediction.prediction, [], 0
    for start, end in mentions(text, prediction.hallucinated):
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [piece for piece in [*pieces, (text[at:], False)] if piece[0]] or [(text, False)]


def _data_uri(file: Path) -> str | None:
    """Return the image as a small JPEG within the page; None where it is gone. It may stand in a Parquet shard."""
    try:
        image = open_image(file)
    except InputError:
        return None
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
