"""SEED-Bench: the share of questions whose predicted choice is the right one.

Li et al. 2023 (SEED-Bench). The published evaluation script does not run as shipped; the rule it
states is used here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pipeline.core.errors import InputError
from pipeline.scores.files import JsonObject, first_few, group_by, id_field, text_field


@dataclass(frozen=True)
class SeedBenchRow:
    """One question: what was predicted, the right choice, and whether they are the same."""

    question_id: str
    prediction: str
    gt_answer: str
    if_right: bool


@dataclass(frozen=True)
class SeedBenchScore:
    """SEED-Bench accuracy as a fraction, over all rows and per dimension where the questions are given."""

    n: int
    accuracy: float
    rows: list[SeedBenchRow]
    per_dimension: dict[str, float]
    n_duplicates: int

    def as_dict(self) -> JsonObject:
        """Return the numbers as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class SeedBenchQuestion:
    """What the questions file says of one question."""

    answer: str
    dimension: str


def questions(
    content: Mapping[str, object], rows: Sequence[Mapping[str, object]], where: str
) -> dict[str, SeedBenchQuestion]:
    """Return {question_id: answer and dimension} of an official SEED-Bench.json.

    The names of the dimensions come from the file itself: ids 3 and 4 changed places between its issues.

    Raises:
        InputError: a record of another shape.
    """
    types = content.get("question_type")
    names = {str(number): name for name, number in types.items()} if isinstance(types, dict) else {}
    known = {}
    for number, row in enumerate(rows):
        at = f"{where}, question {number}"
        dimension = id_field(row, "question_type_id", at)
        known[id_field(row, "question_id", at)] = SeedBenchQuestion(
            answer=text_field(row, "answer", at).strip(), dimension=names.get(dimension, dimension)
        )
    return known


def seed_bench_scores(
    results: Sequence[Mapping[str, object]],
    known: Mapping[str, SeedBenchQuestion] | None = None,
    where: str = "results",
) -> SeedBenchScore:
    """Return the accuracy: rows whose prediction equals the right choice / rows.

    Every row counts, as in the published numbers, where some questions stand twice; how many do is reported.

    Args:
        results: rows with "question_id", "prediction" and, where `known` is not given, "gt_answer".
        known: the questions; gives the answers and the accuracy per dimension.
        where: the file's name, for messages.

    Raises:
        InputError: no row, a bad row, or an id that `known` lacks.
    """
    if not results:
        raise InputError("holds no result", where=where, way_out="Give at least one record")
    rows: list[SeedBenchRow] = []
    unknown = []
    for number, row in enumerate(results):
        at = f"{where}, record {number}"
        key, prediction = id_field(row, "question_id", at), text_field(row, "prediction", at).strip()
        question = known.get(key) if known is not None else None
        if known is not None and question is None:
            unknown.append(key)
            continue
        if question is None and "gt_answer" not in row:
            raise InputError(
                "has no field 'gt_answer'", where=at, way_out="Add it, or give SEED-Bench.json with --questions"
            )
        truth = question.answer if question else text_field(row, "gt_answer", at).strip()
        rows.append(SeedBenchRow(key, prediction, truth, prediction == truth))
    if unknown:
        way_out = "Give the SEED-Bench.json of the same issue"
        raise InputError(f"unknown questions ({first_few(unknown)})", where=where, way_out=way_out)
    by_dimension = group_by(rows, lambda row: known[row.question_id].dimension) if known else {}
    return SeedBenchScore(
        n=len(rows),
        accuracy=_accuracy(rows),
        rows=rows,
        per_dimension={name: _accuracy(members) for name, members in sorted(by_dimension.items())},
        n_duplicates=len(rows) - len({row.question_id for row in rows}),
    )


def _accuracy(rows: Sequence[SeedBenchRow]) -> float:
    return sum(row.if_right for row in rows) / len(rows)
