"""Measures what a study asks for besides scores, one job after another in one process with nothing beside it.

evaluations/measures/<key>.json    one measured trial: configuration, measure and its settings, numbers
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.atomic import write_atomic
from pipeline.config import Params, data_root
from pipeline.digests import file_digest
from pipeline.measure.base import Job, Measure, create
from pipeline.progress import bar
from pipeline.request import TrialRequest
from pipeline.sweep import answers
from pipeline.sweep.space import Cell
from pipeline.tracking.spool import SpooledTracker
from pipeline.trial import KEY_LENGTH, EvaluationConfig, digest

Chosen = Mapping[str, Any]
Scored = tuple[Cell, TrialRequest, EvaluationConfig]
FOLDER = "measures"


def measured(
    params: Params, study: str, scored: Sequence[Scored], out: Path, tracker: SpooledTracker
) -> dict[str, Any]:  # fmt: skip
    """Return, by cell name, what a study's cells were measured as; measure what is not measured yet.

    Args:
        params: the parameters.
        study: its name.
        scored: its scored cells.
        out: folder of the evaluations.
        tracker: where numbers are logged; a store that is away takes them later.

    Returns:
        For each cell `measure`, `measurement` (file), `measurement_digest`, and either `metric`, `unit`, `value`,
        `metrics`, `units` or `error`. Nothing for a study of plain scores.
    """
    definition = params.studies[study]
    kind = create(definition.measure, definition.measured, f"studies.{study}.measured")
    if not kind.units:
        return {}
    groups: dict[tuple[Any, ...], list[Scored]] = {}
    for row in scored:
        groups.setdefault(_group(row[0]), []).append(row)
    files = {
        cell.name: out / FOLDER / f"{_key(definition.measure, kind, evaluation, rows)}.json"
        for rows in groups.values()
        for cell, _, evaluation in rows
    }
    problems: dict[str, str] = {}
    # rows are measured in alternation, so one that is new is measured together with those it is compared with
    open_groups = [rows for rows in groups.values() if not all(files[cell.name].exists() for cell, _, _ in rows)]
    jobs = [[_job(params, row, out) for row in rows] for rows in open_groups]
    with bar(definition.measure) as progress:
        progress(0, len(open_groups))
        for ended, (number, result) in enumerate(answers.measure_all(params, kind, jobs), start=1):
            progress(ended, len(open_groups))
            rows = open_groups[number]
            if isinstance(result, Exception):
                problems.update({cell.name: str(result) for cell, _, _ in rows})
            else:
                _keep(
                    definition.measure, kind, jobs[number], result, [files[cell.name] for cell, _, _ in rows], tracker
                )
    return _related(kind, definition.measure, definition.reference, groups, files, problems, out)


def _group(cell: Cell) -> tuple[Any, ...]:
    return cell.backbone, cell.task, cell.seed, tuple(sorted(cell.vary.items()))


def _key(name: str, kind: Measure, evaluation: EvaluationConfig, rows: Sequence[Scored]) -> str:
    """Return the name of a measured trial; it holds who was measured beside it, as another study's rows are others."""
    beside = sorted(other.key for _, _, other in rows)
    of = {"measure": name, "settings": kind.model_dump(mode="json"), "evaluation": evaluation.key, "beside": beside}
    return digest(of)[:KEY_LENGTH]


def _job(params: Params, row: Scored, out: Path) -> Job:
    cell, request, evaluation = row
    record = json.loads((out / f"{evaluation.key}.json").read_text(encoding="utf-8"))
    return Job(cell.row, request, evaluation, record, str(data_root(params).resolve()))


def _keep(
    name: str, kind: Measure, jobs: Sequence[Job], numbers: Sequence[dict[str, float]], files: Sequence[Path],
    tracker: SpooledTracker,
) -> None:  # fmt: skip
    """Write what each trial of a group was measured as, and log it."""
    for job, measured_as, file in zip(jobs, numbers, files, strict=True):
        record = {
            "trial": job.request.key, "measure": name, "settings": kind.model_dump(mode="json"),
            "evaluation": job.evaluation.model_dump(mode="json"), "run_id": job.scored.get("run_id"),
            "numbers": measured_as, "machine": tracker.tracker.provenance["machine"],
        }  # fmt: skip
        write_atomic(file, json.dumps(record, indent=1, sort_keys=True))
        if record["run_id"]:
            tracker.log_evaluation(record["run_id"], measured_as, file)


def _related(
    kind: Measure, name: str, reference: str | None, groups: Mapping[Any, Sequence[Scored]],
    files: Mapping[str, Path], problems: Mapping[str, str], out: Path,
) -> dict[str, Any]:  # fmt: skip
    found: dict[str, Any] = {}
    for rows in groups.values():
        numbers: dict[str, dict[str, float]] = {}
        for cell, _, _ in rows:
            file = files[cell.name]
            if file.exists() and cell.name not in problems:
                numbers[cell.name] = json.loads(file.read_text(encoding="utf-8"))["numbers"]
        base_row = reference or rows[0][0].row
        base = next((numbers.get(cell.name) for cell, _, _ in rows if cell.row == base_row), None)
        for cell, _, _ in rows:
            if cell.name not in numbers:
                found[cell.name] = {"measure": name, "error": problems.get(cell.name, "not measured")}
                continue
            related = kind.relate(numbers[cell.name], base)
            main = str(kind.metric)
            found[cell.name] = {
                "measure": name, "measurement": str(files[cell.name].relative_to(out.parent)),
                "measurement_digest": file_digest(files[cell.name]), "metric": main,
                "unit": kind.units[main], "value": related.get(main), "metrics": related, "units": dict(kind.units),
            }  # fmt: skip
    return found
