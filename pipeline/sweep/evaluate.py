"""Stage `evaluate`: choose each cell's trial on the selection set, score it once, measure what a study asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import Params, TrialRequest, data_root
from pipeline.config.trial import KEY_LENGTH, EvaluationConfig, TrialConfig, digest
from pipeline.core import copies
from pipeline.core.errors import WorkError
from pipeline.core.files import file_digest
from pipeline.core.progress import bar, say
from pipeline.measure import Measure, Measured, MeasureJob, create_measure
from pipeline.plan.plan import Choice, Plan, all_cells, choose, evaluation_of, make_plan, places
from pipeline.plan.space import Cell
from pipeline.pool import supervisor
from pipeline.pool.processes import in_order
from pipeline.pool.supervisor import Drivers
from pipeline.records.evaluation import CellResult, CurvePoint, Evaluations, Measurement, StudyFile
from pipeline.records.store import TrialStore
from pipeline.records.trial import Machine, TrialEnd
from pipeline.sweep.mlflow_sync import COSTS, MlflowSync, experiment_note
from pipeline.tasks import tasks
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import KILLED


def evaluate(params: Params, studies: list[str], drivers: Drivers, root: Path | None = None) -> None:
    """Score what the studies need and is not scored yet, and write the studies' cells.

    Safe to kill and to run again: what is scored is not scored twice.

    Args:
        params: the studies'.
        studies: by name.
        drivers: the command's.
        root: the project's folder; None: the current one.

    Raises:
        WorkError: some trials are missing or could not be scored; the others are done.
    """
    root = root or Path.cwd()
    store = TrialStore(places(root).runs)
    held = store.lock("an evaluation", wait=copies.is_copy(root))
    with in_order(), held, copies.shared_evaluations(root):
        _evaluate(params, studies, root, store, drivers)


def _evaluate(params: Params, studies: list[str], root: Path, store: TrialStore, drivers: Drivers) -> None:
    folders, evaluations = places(root), Evaluations(root.resolve() / "evaluations")
    cells = all_cells(params, studies, folders)
    plan = make_plan(params, cells, folders, store.objective)
    chosen = {cell.name: choose(params, cell, store) for cell in cells}
    scoring = {
        cell.name: evaluation_of(params, cell, choice.trial)
        for cell in cells
        if (choice := chosen[cell.name]).trial is not None
    }
    jobs = {config.key: (store.config(config.trial), config) for config in scoring.values()}
    todo = [job for key, job in jobs.items() if not evaluations.path(key).exists()]
    say(f"{len(jobs)} trials to score, {len(jobs) - len(todo)} are scored")
    if todo:
        drivers.start(params.sweep)  # while MLflow is opened
    else:
        drivers.end()
    tracker = Tracker(params.tracking.uri, root, params.tracking.artifacts)
    tracker.prepare(studies, {study: experiment_note(params, study, cells) for study in studies})
    sync = MlflowSync(tracker, store, plan, studies)
    try:
        sync.find_runs([config.key for config, _ in jobs.values()])
    finally:
        tracker.close_all(KILLED)  # of sweeps that were to be brought in line
    for key, (config, _) in jobs.items():
        if evaluations.path(key).exists():
            sync.score(config, key)
    problems = dict(_score(params, plan, todo, evaluations, sync, drivers)) if todo else {}
    missing: dict[str, str] = {}
    for study in studies:
        results = {
            cell.name: _result(cell, chosen[cell.name], scoring.get(cell.name), evaluations, store, problems)
            for cell in cells
            if cell.study == study
        }
        scored = [
            ScoredCell(cell, results[cell.name], plan.request_of(*jobs[scoring[cell.name].key]), scoring[cell.name])
            for cell in cells
            if cell.name in results and results[cell.name].status == "done"
        ]
        numbers = measured(params, study, scored, evaluations, sync, drivers)
        results |= {row.cell.name: result for row, result in zip(scored, numbers, strict=True)}
        without = {name: row.error or row.status for name, row in results.items() if row.status != "done"}
        for name, why in without.items():
            if chosen[name].halted:
                say(f"note: {name} has no number: {why}")
            else:
                missing[name] = why
        store.check_held()  # or an older result would take the place of another evaluation's
        evaluations.write_study(
            StudyFile(
                study=study, title=params.studies[study].title, profile=params.profile,
                selection=params.train.selection, protocol=params.protocol, cells=tuple(results.values()),
                provenance=tracker.provenance.model_copy(update={"diff": ""}),
            )
        )  # fmt: skip
    sync.register(choice.trial for choice in chosen.values())
    sync.settle(params.tracking.patience_seconds)
    if problems:
        key, why = next(iter(problems.items()))
        raise WorkError(
            f"{len(problems)} of {len(jobs)} trials could not be scored; the first, {key}: {why}", where="evaluate"
        )
    if missing:
        name, why = next(iter(missing.items()))
        raise WorkError(
            f"{len(missing)} of {len(cells)} cells have no number; the first, {name}: {why}",
            where="evaluate",
            way_out="Run `dvc repro train`, or `hificl sweep`; what is scored is kept",
        )


def _score(
    params: Params, plan: Plan, todo: list[tuple[TrialConfig, EvaluationConfig]], evaluations: Evaluations,
    sync: MlflowSync, drivers: Drivers,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Score trials on the cluster; yield (evaluation key, error) of those that fail."""
    left_out: dict[str, None] = {}  # in order, and each once: every trial of a task lacks the same file
    configs = {evaluation.key: config for config, evaluation in todo}
    with bar("evaluate") as progress:
        progress(0, len(todo))
        jobs = [(plan.request_of(config, evaluation), evaluation) for config, evaluation in todo]
        for number, (key, result) in enumerate(supervisor.score_all(params, jobs, drivers), start=1):
            progress(number, len(todo))
            if isinstance(result, Exception):
                yield key, str(result)
                continue
            evaluations.write(key, sync.with_origin(result))
            sync.score(configs[key], key)
            left_out.update(dict.fromkeys(result.left_out))
    for line in left_out:
        say(f"left out: {line}")


def _result(
    cell: Cell, choice: Choice, scoring: EvaluationConfig | None, evaluations: Evaluations, store: TrialStore,
    problems: dict[str, str],
) -> CellResult:  # fmt: skip
    """Return a cell's score, or why it has none."""
    task, key = tasks.get(cell.task), scoring.key if scoring else None
    error = problems.get(key or "", choice.error)
    result = CellResult(
        row=cell.row, label=cell.label, method=cell.method, backbone=cell.backbone, paper_backbone=cell.paper_backbone,
        task=cell.task, paper_task=cell.paper_task, vary=cell.vary, seed=cell.seed, metric=task.metric, unit=task.unit,
        trial=choice.trial, searched=choice.searched, candidates=choice.candidates, evaluation=key, error=error,
        status="failed" if error else "missing",
    )  # fmt: skip
    evaluation = evaluations.find(key)
    if evaluation is None or key is None:
        return result
    end = store.done(evaluation.trial) or TrialEnd(status="finished")
    curve = tuple(
        CurvePoint.model_validate({name: getattr(report, name) for name in CurvePoint.model_fields})
        for report in store.epochs(evaluation.trial)
    )
    return result.model_copy(
        update={
            "status": "done", "error": None, "value": evaluation.value, "metrics": evaluation.metrics,
            "run_id": evaluation.run_id, "num_samples": evaluation.num_samples, "chosen_epoch": end.chosen_epoch,
            **{name: getattr(end, name) for name in COSTS}, "evaluation_digest": file_digest(evaluations.path(key)),
            "epochs": curve,
        }
    )  # fmt: skip


@dataclass(frozen=True)
class ScoredCell:
    """A cell with the score of its chosen trial, over which a measurement is laid."""

    cell: Cell
    result: CellResult
    request: TrialRequest
    evaluation: EvaluationConfig


def measured(
    params: Params, study: str, scored: Sequence[ScoredCell], evaluations: Evaluations, sync: MlflowSync,
    drivers: Drivers,
) -> list[CellResult]:  # fmt: skip
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
        for ended, (number, result) in enumerate(supervisor.measure_all(params, kind, jobs, drivers), start=1):
            progress(ended, len(new))
            names = [row.cell.name for row in new[number]]
            if isinstance(result, Exception):
                problems |= dict.fromkeys(names, str(result))
                continue
            for cell_name, job, of_job in zip(names, jobs[number], result, strict=True):
                _keep(name, kind, job, of_job, keys[cell_name], evaluations, sync.tracker.provenance.machine)
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
    of |= {"revision": str(kind.revision)} if kind.revision > 1 else {}
    return digest(of)[:KEY_LENGTH]


def _job(params: Params, row: ScoredCell, evaluations: Evaluations) -> MeasureJob:
    scored = evaluations.read(row.evaluation.key)
    return MeasureJob(row.cell.row, row.request, row.evaluation, scored, str(data_root(params).resolve()))


def _keep(
    name: str, kind: Measure, job: MeasureJob, of_job: Measured, key: str, evaluations: Evaluations, machine: Machine
) -> None:
    """Write what a trial was measured as."""
    measurement = Measurement(
        trial=job.request.key, measure=name, settings=kind.model_dump(mode="json"),
        evaluation=job.evaluation.model_dump(mode="json"), run_id=job.scored.run_id,
        numbers=of_job.numbers, layers=of_job.layers, machine=machine,
    )  # fmt: skip
    evaluations.write_measurement(key, measurement)


def _related(
    kind: Measure, name: str, reference: str | None, rows: Sequence[ScoredCell], keys: Mapping[str, str],
    problems: Mapping[str, str], evaluations: Evaluations,
) -> dict[str, CellResult]:  # fmt: skip
    """Return a group's results by cell name, each number beside its ratio to the reference row's."""
    kept = {row.cell.name: evaluations.find_measurement(keys[row.cell.name]) for row in rows}
    known = {key: was for key, was in kept.items() if was is not None and key not in problems}
    numbers = {key: dict(was.numbers) for key, was in known.items()}
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
                "layers": known[row.cell.name].layers,
            }  # fmt: skip
        else:
            error = problems.get(row.cell.name, "not measured")
            fields |= {"error": error, "status": "failed", "value": None, "metrics": {}}
        results[row.cell.name] = row.result.model_copy(update=fields)
    return results
