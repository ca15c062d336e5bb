"""Stage `evaluate`: choose each cell's trial on the selection set, score it once, write one JSON a trial.

evaluations/<key>.json            one scored trial: configuration, score, predictions with ids
evaluations/studies/<study>.json  the cells of a study, each with its chosen trial and its candidates
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import copies, methods
from pipeline.atomic import write_atomic
from pipeline.config import Params
from pipeline.digests import file_digest
from pipeline.errors import WorkError
from pipeline.progress import bar, say
from pipeline.records.trial import TrialEnd
from pipeline.sweep import answers
from pipeline.sweep.measures import measured
from pipeline.sweep.models import register_chosen
from pipeline.sweep.naming import experiment_note
from pipeline.sweep.plan import Plan, all_cells, make_plan, places
from pipeline.sweep.run import SPOOL
from pipeline.sweep.scores import COSTS, Scores
from pipeline.sweep.signals import in_order
from pipeline.sweep.space import Cell, Point, points
from pipeline.sweep.store import TrialStore
from pipeline.sweep.supervisor import Driver, ahead
from pipeline.tasks import tasks
from pipeline.tasks.vqa_files import VqaTask
from pipeline.tracking.runs import Tracker
from pipeline.tracking.spool import SpooledTracker
from pipeline.trial import EvaluationConfig, TrialConfig

SCHEMA = 1
CURVES = ("epoch", "train_loss", "ground_truth_loss", "alignment_loss", "selection_score")  # of a trial, for figures


def evaluate(params: Params, studies: list[str], root: Path | None = None) -> None:
    """Score what the studies need and is not scored yet, and write the studies' cells.

    Safe to kill and to run again: what is scored is not scored twice.

    Raises:
        WorkError: some trials are missing or could not be scored; the others are done.
    """
    root = root or Path.cwd()
    store = TrialStore(places(root).runs)
    held = store.lock("an evaluation", wait=copies.is_copy(root))
    with in_order(), held, copies.shared_evaluations(root):
        _evaluate(params, studies, root, store)


def _evaluate(params: Params, studies: list[str], root: Path, store: TrialStore) -> None:
    where, out = places(root), root.resolve() / "evaluations"
    cells = all_cells(params, studies, where)
    plan = make_plan(params, cells, where)
    chosen = {cell.name: _choose(params, cell, store) for cell in cells}
    jobs: dict[str, tuple[TrialConfig, EvaluationConfig]] = {}
    for cell in cells:
        trial = chosen[cell.name]["trial"]
        if trial is not None:
            config = _evaluation(params, cell, trial)
            chosen[cell.name]["evaluation"] = config.key
            jobs[config.key] = (store.config(trial), config)
    todo = [job for key, job in jobs.items() if not (out / f"{key}.json").exists()]
    say(f"{len(jobs)} trials to score, {len(jobs) - len(todo)} are scored")
    with ahead(bool(todo)) as driver:
        tracker = Tracker(params.tracking.uri, root, params.tracking.artifacts)
        tracker.prepare(studies, {study: experiment_note(params, study, cells) for study in studies})
        spooled = SpooledTracker(tracker, where.runs / SPOOL)
        spooled.deliver()
        log = Scores(spooled, plan, store, out)
        for key, (scored_trial, _) in jobs.items():
            if (out / f"{key}.json").exists():
                log.show(scored_trial, key)
        problems = dict(_score(params, plan, todo, out, log, driver)) if todo else {}
    missing: dict[str, str] = {}
    for study in studies:
        of_study = [cell for cell in cells if cell.study == study]
        mine = [_record(cell, chosen[cell.name], out, store, problems) for cell in of_study]
        scored = [
            (cell, plan.request_of(jobs[row["evaluation"]][0]), jobs[row["evaluation"]][1])
            for cell, row in zip(of_study, mine, strict=True)
            if row["status"] == "done"
        ]
        numbers = measured(params, study, scored, out, spooled)
        mine = [_overlaid(row, numbers.get(cell.name)) for cell, row in zip(of_study, mine, strict=True)]
        rows = zip(of_study, mine, strict=True)
        missing |= {cell.name: row["error"] or row["status"] for cell, row in rows if row["status"] != "done"}
        record = {
            "schema": SCHEMA, "study": study, "title": params.studies[study].title, "profile": params.profile,
            "selection": params.train.selection, "protocol": params.protocol, "cells": mine,
            "provenance": {k: v for k, v in tracker.provenance.items() if k != "diff"},
        }  # fmt: skip
        write_atomic(out / "studies" / f"{study}.json", json.dumps(record, indent=1, sort_keys=True))
    spooled.settle(params.tracking.patience_seconds)
    register_chosen(tracker, store, (row["trial"] for row in chosen.values()))
    if problems:
        key, why = next(iter(problems.items()))
        raise WorkError(
            f"{len(problems)} of {len(jobs)} trials could not be scored; the first, {key}: {why}", where="evaluate"
        )
    if missing:
        name, why = next(iter(missing.items()))
        raise WorkError(
            f"{len(missing)} of {len(cells)} cells have no number; the first, {name}: {why}", where="evaluate",
            way_out="Run `dvc repro train`, or `hificl sweep`; what is scored is kept",
        )  # fmt: skip


def candidates(params: Params, cell: Cell, store: TrialStore) -> list[tuple[Point, TrialConfig]]:
    """Return the points of a cell with their trials; under Optuna, those that the store holds."""
    if params.sweep.search != "optuna" or not cell.search:
        return [(point, cell.trial(point)) for point in points(cell, params)]
    found = []
    for key in store.all_keys():
        config = store.config(key)
        values = {**config.model_dump(), **config.options}
        point = {name: values[name] for name in cell.search if name in values}
        if len(point) == len(cell.search) and config.method == cell.method and cell.trial(point).key == key:
            found.append((point, config))
    return found


def _choose(params: Params, cell: Cell, store: TrialStore) -> dict[str, Any]:
    """Return the cell's candidates and the one with the best objective on the selection set."""
    rows, best, problem = [], None, None
    for point, config in candidates(params, cell, store):
        done = store.done(config.key)
        objective = done.objective if done else None
        rows.append({"trial": config.key, "searched": point, "selection_score": objective,
                     "status": done.status if done else "missing"})  # fmt: skip
        if done is None or done.status not in ("finished", "stopped"):
            problem = problem or (done.error if done else None) or f"trial {config.key} is {rows[-1]['status']}"
            continue
        if best is None or (objective is not None and objective > best[2]):
            best = (config.key, point, objective if objective is not None else float("-inf"))
    return {
        "trial": best[0] if best else None, "searched": best[1] if best else {}, "candidates": rows,
        "error": None if best else problem or "no trial", "evaluation": None,
    }  # fmt: skip


def _evaluation(params: Params, cell: Cell, trial: str) -> EvaluationConfig:
    settings, own, task = params.evaluate, methods.published_decoding(cell.method), tasks.get(cell.task)
    given = {name: getattr(settings.generation, name) for name in ("num_beams", "length_penalty", "max_new_tokens")}
    decoding = {name: getattr(own, name) if value == "published" else value for name, value in given.items()}
    decoding["max_new_tokens"] = decoding["max_new_tokens"] or task.max_new_tokens
    return EvaluationConfig(
        trial=trial, num_samples=settings.num_evaluation_samples, **decoding, vqa_normalise=settings.vqa_normalise,
        drop_incomplete_batch=settings.drop_incomplete_batch,
        stem_predictions=settings.stem_predictions and isinstance(task, VqaTask) and task.stemmed_references,
    )  # fmt: skip


def _score(
    params: Params, plan: Plan, todo: list[tuple[TrialConfig, EvaluationConfig]], out: Path, log: Scores,
    driver: Driver | None,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Score trials on the cluster; yield (evaluation key, error) of those that fail."""
    left_out: dict[str, None] = {}  # in order, and each once: every trial of a task lacks the same file
    configs = {evaluation.key: config for config, evaluation in todo}
    with bar("evaluate") as progress:
        progress(0, len(todo))
        jobs = [(plan.request_of(config), evaluation) for config, evaluation in todo]
        for number, (key, result) in enumerate(answers.score_all(params, jobs, driver), start=1):
            progress(number, len(todo))
            if isinstance(result, Exception):
                yield key, str(result)
                continue
            record = {"schema": SCHEMA, **result, "run_id": log.run_of(result["trial"]), **log.origin(result["trial"])}
            write_atomic(out / f"{key}.json", json.dumps(record, indent=0, sort_keys=True))
            log.show(configs[key], key)
            left_out.update(dict.fromkeys(result["details"].get("left_out", ())))
    for line in left_out:
        say(f"left out: {line}")


def _overlaid(record: dict[str, Any], numbers: dict[str, Any] | None) -> dict[str, Any]:
    """Return a cell whose number is what was measured, where the study measures something."""
    if numbers is None:
        return record
    if "error" in numbers:
        return {**record, **numbers, "status": "failed", "value": None, "metrics": {}}
    return {**record, **numbers, "metrics": {**record["metrics"], **numbers["metrics"]}}


def _record(
    cell: Cell, chosen: dict[str, Any], out: Path, store: TrialStore, problems: dict[str, str]
) -> dict[str, Any]:
    task = tasks.get(cell.task)
    record: dict[str, Any] = {
        "row": cell.row, "label": cell.label, "method": cell.method, "backbone": cell.backbone,
        "paper_backbone": cell.paper_backbone, "task": cell.task, "paper_task": cell.paper_task, "vary": cell.vary,
        "seed": cell.seed, "metric": task.metric, "unit": task.unit, "value": None, "metrics": {}, "run_id": None,
        **dict.fromkeys(COSTS), "chosen_epoch": None, "num_samples": None, **chosen,
    }  # fmt: skip
    evaluation = chosen["evaluation"]
    path = out / f"{evaluation}.json"
    if evaluation is None or not path.exists():
        error = problems.get(evaluation or "", chosen["error"])
        return {**record, "status": "failed" if error else "missing", "error": error}
    scored = json.loads(path.read_text(encoding="utf-8"))
    done = store.done(chosen["trial"]) or TrialEnd(status="finished")
    return {
        **record, "status": "done", "error": None, "value": scored["value"], "metrics": scored["metrics"],
        "run_id": scored["run_id"], "num_samples": scored["num_samples"], "chosen_epoch": done.chosen_epoch,
        **{name: getattr(done, name) for name in COSTS},
        "evaluate_seconds": scored.get("seconds"), "evaluation_digest": file_digest(path),
        "epochs": [{name: getattr(row, name) for name in CURVES} for row in store.epochs(chosen["trial"])],
    }  # fmt: skip
