"""Answers of the methods side by side on the same samples, chosen where they differ."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.image_files import thumbnail
from pipeline.records.evaluation import Evaluations, Prediction
from pipeline.report import papers
from pipeline.report.tables import Column, Line, Table
from pipeline.scores.chair import mentions

SAMPLES = 4  # a task
_MAX_SIDE = 320  # pixels: the page carries its images itself


@dataclass(frozen=True)
class ShownAnswer:
    """One row's answer: its text in pieces as `marked_pieces` has them, and whether it is among the best."""

    parts: list[tuple[str, bool]]
    right: bool


@dataclass(frozen=True)
class SampleAnswers:
    """One sample with each row's answer; `image` is a data URI, and `words` what stands for it."""

    id: str
    question: str | None
    references: str
    image: str | None
    words: str
    answers: list[ShownAnswer]


@dataclass(frozen=True)
class AnswerTable:
    """The rows' names, and the samples that were chosen."""

    rows: list[str]
    samples: list[SampleAnswers]


def answer_table(table: Table, evaluations: Path) -> AnswerTable | None:
    """Return samples with each row's answer; None where there is nothing to show.

    Half of the samples are those on which the study's reference row is furthest above the others' mean, half those on
    which it is furthest below: its best and its worst. Ties go by the order of the ids.
    """
    groups = table.groups()
    if not groups:
        return None
    lines = groups[0][1]
    samples: list[SampleAnswers] = []
    for column in table.columns:
        if column.metric is None:
            answers = {line: _answers(table, line, column, evaluations) for line in lines}
            samples += _samples(answers, evaluations, papers.label("tasks", column.task), table.reference)
    return AnswerTable([line.title for line in lines], samples) if samples else None


def _answers(table: Table, line: Line, column: Column, evaluations: Path) -> dict[str, Prediction]:
    key = next((cell.evaluation for cell in table.entries[line, column].done if cell.evaluation), None)
    evaluation = Evaluations(evaluations).find(key)
    return {str(prediction.sample_id): prediction for prediction in evaluation.predictions} if evaluation else {}


def _samples(
    answers: dict[Line, dict[str, Prediction]], evaluations: Path, task: str, reference: str | None
) -> list[SampleAnswers]:
    by_line = {line: predictions for line, predictions in answers.items() if predictions}
    if not by_line:
        return []
    shared = set.intersection(*map(set, by_line.values()))

    def lead(sample: str) -> float:
        scores = [(line.row == reference, row[sample].score or 0.0) for line, row in by_line.items()]
        of_reference = [score for is_reference, score in scores if is_reference]
        others = [score for is_reference, score in scores if not is_reference]
        return sum(of_reference) / len(of_reference) - sum(others) / len(others) if of_reference and others else 0.0

    best_first = sorted(shared, key=lambda sample: (-lead(sample), len(sample), sample))
    worst_first = sorted(shared, key=lambda sample: (lead(sample), len(sample), sample))
    half = SAMPLES // 2
    worst = [sample for sample in worst_first if sample not in best_first[:half]][:half]
    out = []
    for sample in best_first[:half] + worst:
        predictions = {line: row[sample] for line, row in by_line.items()}
        best = max((prediction.score or 0.0 for prediction in predictions.values()), default=0.0)
        image = next((prediction.image for prediction in predictions.values() if prediction.image), None)
        question = next((prediction.question for prediction in predictions.values() if prediction.question), None)
        references = next((prediction.references for prediction in predictions.values() if prediction.references), ())
        out.append(
            SampleAnswers(
                id=f"{task} {sample}",
                question=question,
                references="; ".join(dict.fromkeys(references)),
                image=_data_uri(evaluations.parent / image) if image else None,
                words=question or f"Image of sample {sample}",
                answers=[_shown(predictions.get(line), best) for line in answers],
            )
        )
    return out


def _shown(prediction: Prediction | None, best: float) -> ShownAnswer:
    if prediction is None:
        return ShownAnswer([], right=False)
    return ShownAnswer(marked_pieces(prediction), right=(prediction.score or 0.0) == best > 0)


def marked_pieces(prediction: Prediction) -> list[tuple[str, bool]]:
    """Return an answer's text in pieces, each with whether it names what its image does not show (CHAIR)."""
    text, pieces, at = prediction.prediction, [], 0
    for start, end in mentions(text, prediction.hallucinated):
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [piece for piece in [*pieces, (text[at:], False)] if piece[0]] or [(text, False)]


def _data_uri(file: Path) -> str | None:
    """Return the image as a small JPEG within the page; None where it is gone. It may stand in a Parquet shard."""
    data = thumbnail(file, _MAX_SIDE, "JPEG", quality=85)
    return None if data is None else f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
