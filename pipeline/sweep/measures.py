"""Measures what a study asks for besides scores, one job after another in one process with nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.load import Params, data_root
from pipeline.config.request import TrialRequest
from pipeline.config.trial import KEY_LENGTH, EvaluationConfig, digest
from pipeline.core.files import file_digest
from pipeline.core.progress import bar
from pipeline.measure import Measure, MeasureJob, Numbers, create_measure
from pipeline.plan.space import Cell
from pipeline.pool import supervisor
from pipeline.records.evaluation import CellResult, Evaluations, Measurement
from pipeline.records.trial import Machine
from pipeline.sweep.mlflow_sync import MlflowSync


@dataclass(frozen=True)
class ScoredCell:
    """A cell with the score of its chosen trial, over which a measurement is laid."""

    cell: Cell
    result: CellResult
    request: TrialRequest
    evaluation: EvaluationConfig


def measured(
    params: Params, study: str, scored: Sequence[ScoredCell], evaluations: Evaluations, sync: MlflowSync
) -> list[CellResult]:
    """Return what a study's scored cells come out as; measure, keep and log what is not measured yet.

    Returns:
        The cells' results in order. Those of a study of plain scores are as they were.
    """
    definition = params.studies[study]
    name = definition.measure
    kind = create_measure(name, definition.measured, f"studies.{study}.measured")
    if not kind.units:
        return [row.result for row in scored]
    groups: dict[tuple[Any, ...], list[ScoredCell]] = {}
    for row in scored:
        cell = row.cell
        groups.setdefault((cell.backbone, cell.task, cell.seed, *sorted(cell.vary.items())), []).append(row)
    keys = {row.cell.name: _key(name, kind, row.evaluation, rows) for rows in groups.values() for row in rows}
    problems: dict[str, str] = {}
    # rows are measured in alternation, so one that is new is measured together with those it is compared with
    new = [
        rows
        for rows in groups.values()
        if not all(evaluations.measurement_path(keys[row.cell.name]).exists() for row in rows)
    ]
    jobs = [[_job(params, row, evaluations) for row in rows] for rows in new]
    with bar(name) as progress:
        progress(0, len(new))
        for ended, (number, result) in enumerate(supervisor.measure_all(params, kind, jobs), start=1):
            progress(ended, len(new))
            names = [row.cell.name for row in new[number]]
            if isinstance(result, Exception):
                problems |= dict.fromkeys(names, str(result))
                continue
            for cell_name, job, numbers in zip(names, jobs[number], result, strict=True):
                _keep(name, kind, job, numbers, keys[cell_name], evaluations, sync.tracker.provenance.machine)
    for key in keys.values():
        if evaluations.measurement_path(key).exists():
            sync.measurement(key)
    results: dict[str, CellResult] = {}
    for rows in groups.values():
        results |= _related(kind, name, definition.reference, rows, keys, problems, evaluations)
    return [results[row.cell.name] for row in scored]


def _key(name: str, kind: Measure, evaluation: EvaluationConfig, rows: Sequence[ScoredCell]) -> str:
    """Return the name of a measured trial; it holds who was measured beside it, as another study's rows are others."""
    beside = sorted(row.evaluation.key for row in rows)
    of = {"measure": name, "settings": kind.model_dump(mode="json"), "evaluation": evaluation.key, "beside": beside}
    return digest(of)[:KEY_LENGTH]


def _job(params: Params, row: ScoredCell, evaluations: Evaluations) -> MeasureJob:
    scored = evaluations.read(row.evaluation.key)
    return MeasureJob(row.cell.row, row.request, row.evaluation, scored, str(data_root(params).resolve()))


def _keep(
    name: str, kind: Measure, job: MeasureJob, numbers: Numbers, key: str, evaluations: Evaluations, machine: Machine
) -> None:
    """Write what a trial was measured as."""
    measurement = Measurement(
        trial=job.request.key, measure=name, settings=kind.model_dump(mode="json"),
        evaluation=job.evaluation.model_dump(mode="json"), run_id=job.scored.run_id, numbers=numbers,
        machine=machine,
    )  # fmt: skip
    evaluations.write_measurement(key, measurement)


def _related(
    kind: Measure, name: str, reference: str | None, rows: Sequence[ScoredCell], keys: Mapping[str, str],
    problems: Mapping[str, str], evaluations: Evaluations,
) -> dict[str, CellResult]:  # fmt: skip
    """Return a group's results by cell name, each number beside its ratio to the reference row's."""
    kept = {row.cell.name: evaluations.find_measurement(keys[row.cell.name]) for row in rows}
    numbers = {key: dict(was.numbers) for key, was in kept.items() if was is not None and key not in problems}
    base_row = reference or rows[0].cell.row
    base = next((numbers.get(row.cell.name) for row in rows if row.cell.row == base_row), None)
    main = str(kind.metric)
    results = {}
    for row in rows:
        fields: dict[str, Any] = {"measure": name}
        if row.cell.name in numbers:
            path = evaluations.measurement_path(keys[row.cell.name])
            related = kind.relate(numbers[row.cell.name], base)
            fields |= {
                "measurement": str(path.relative_to(evaluations.root.parent)), "measurement_digest": file_digest(path),
                "metric": main, "unit": kind.units[main], "value": related.get(main),
                "metrics": {**row.result.metrics, **related}, "units": dict(kind.units),
            }  # fmt: skip
        else:
            error = problems.get(row.cell.name, "not measured")
            fields |= {"error": error, "status": "failed", "value": None, "metrics": {}}
        results[row.cell.name] = row.result.model_copy(update=fields)
    return results
