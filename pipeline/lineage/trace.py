"""`hificl trace`: which number of a report is meant, and from it to its run, adapter, data and commit."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from pipeline import backbones, report
from pipeline.config.load import Params
from pipeline.config.trial import EvaluationConfig, TrialConfig, digest
from pipeline.core.errors import HificlError, InputError, nearest
from pipeline.core.files import file_digest, folder_digest
from pipeline.core.plain_yaml import Json
from pipeline.data import image_files
from pipeline.data.manifest import Manifest
from pipeline.data.parquet import shard_order
from pipeline.lineage.run_record import DIFFERS, MISSING, SAME, UNRECORDED, Check, Checks, key_of
from pipeline.lineage.traced import (
    Chain,
    MadeFrom,
    NamedManifest,
    NamedRun,
    TracedAdapter,
    TracedBackbone,
    TracedCell,
    TracedCode,
    TracedManifest,
    TracedNumber,
    TracedReports,
    TracedRun,
    TracedStudy,
)
from pipeline.records.evaluation import CellResult, Evaluation, Evaluations
from pipeline.records.store import TrialStore
from pipeline.report import papers
from pipeline.report.tables import Table, TableEntry
from pipeline.report.writers import number
from pipeline.tracking.client import Tracker
from pipeline.tracking.provenance import code_root, has_commit
from pipeline.tracking.records import rounded


def trace_number(place: Place, params: Params, root: Path) -> TracedNumber:
    """Walk from a number to everything it was made from, checking each digest on the way.

    Args:
        place: the number.
        params: the project's.
        root: the project's folder.

    Raises:
        InputError: no trial stands behind the number.
    """
    entry = place.entry
    done = entry.done
    if not done:
        why = "; ".join(cell.error or cell.status for cell in entry.cells)
        raise InputError(f"no number stands there: {why}", where=f"{place.study} {entry.line.method}")
    walk = _Walk(params, root, Checks())
    chains = walk.chains(place)
    cell = TracedCell(
        study=place.study, file=str(place.file) if place.file else None, backbone=entry.line.backbone,
        task=entry.column.task, method=entry.line.method, metric=entry.metric, value=entry.value,
        std=entry.std, unit=entry.unit, seeds=[cell.seed for cell in done],
    )  # fmt: skip
    return TracedNumber(cell, chains, walk.checks.made, walk.wrong())


def trace_reports(studies: list[str], params: Params, root: Path) -> TracedReports:
    """Walk from every number of the studies' reports to what it was made from; what they share is read once.

    Args:
        studies: names; none: every study that has been evaluated.
        params: the project's.
        root: the project's folder.

    Raises:
        InputError: a study has not been evaluated, or none has.
    """
    evaluations = root / "evaluations"
    studies = studies or Evaluations(evaluations).studies()
    if not studies:
        raise InputError("no study has been evaluated", where=str(evaluations), way_out="Run `dvc repro` first")
    walk = _Walk(params, root, Checks())
    traced, runs = {}, set()
    for study in studies:
        numbers = every_place(study, params, evaluations)
        chains = [chain for place in numbers for chain in walk.chains(place)]
        runs |= {chain.run.run_id for chain in chains if chain.run}
        empty = sum(not place.entry.done for place in numbers)
        traced[study] = TracedStudy(len(numbers) - empty, empty, len(chains))
    return TracedReports(traced, len(runs), len(walk.checks.made), walk.wrong())


class _Walk:
    """One walk over the seeds of a number; what they share is read once."""

    def __init__(self, params: Params, root: Path, checks: Checks) -> None:
        self.params, self.root, self.checks = params, root, checks
        self.store = TrialStore(root / "runs")
        self.tracker = Tracker(params.tracking.uri, root)
        self.manifest = functools.cache(self._manifest)

    def wrong(self) -> list[str]:
        """Return what is not as it was recorded, in sentences."""
        return [check.sentence() for check in self.checks.wrong]

    def chains(self, place: Place) -> list[Chain]:
        """Return the way of each seed of a number, after comparing it with what its file prints."""
        if place.printed is not None:
            name = f"{place.file or place.study} {place.entry.line.method}:{place.entry.column.task}"
            self.checks.compare("report", name, expected(place.entry), place.printed)
        return [self.chain(cell) for cell in place.entry.done]

    def chain(self, cell: CellResult) -> Chain:
        """Return the way of one seed's number."""
        evaluation = self._evaluation(cell)
        run = self._run(cell, evaluation)
        config = self._trial(cell, evaluation)
        if evaluation and evaluation.target:  # it is scored on another task's samples
            self.manifest(*evaluation.target)
        origin = None
        if config is not None:
            origin = MadeFrom(
                config=config,
                adapter=self._adapter(cell, evaluation, run) if config["epochs"] else None,
                data=self.manifest(str(config["task"]), str(config["manifest_digest"])),
                backbone=self._backbone(str(config["backbone"]), str(config["backbone_digest"])),
                code=self._code(cell),
            )
        return Chain(
            seed=cell.seed, value=cell.value, run=run, trial=cell.trial,
            evaluation=f"evaluations/{cell.evaluation}.json",
            scored_by=evaluation.scored_by if evaluation else None, origin=origin,
            by_hand=[act.told for act in self.store.acts(str(cell.trial))],
        )  # fmt: skip

    def _evaluation(self, cell: CellResult) -> Evaluation | None:
        evaluations, key = Evaluations(self.root / "evaluations"), str(cell.evaluation)
        path = evaluations.path(key)
        place = path.relative_to(self.root)
        try:
            evaluation = evaluations.read(key)
        except InputError as error:
            self.checks.add(Check("evaluation", str(place), cell.evaluation, error.what, MISSING))
            return None
        if cell.evaluation_digest:
            self.checks.compare("evaluation", place, cell.evaluation_digest, file_digest(path))
        self.checks.compare("evaluation's key", place, key, key_of(EvaluationConfig, evaluation.evaluation, key))
        if cell.measurement:
            measured = self.root / cell.measurement
            self.checks.compare("measurement", cell.measurement, cell.measurement_digest, _digest_of(measured))
        else:
            self.checks.compare("evaluation's value", place, cell.value, evaluation.value)
        self.checks.compare("evaluation's trial", place, cell.trial, evaluation.trial)
        return evaluation

    def _run(self, cell: CellResult, evaluation: Evaluation | None) -> NamedRun | None:
        if cell.run_id is None:
            self.checks.add(Check("run", cell.trial or "", None, None, MISSING))
            return None
        try:
            run = self.tracker.read_run(cell.run_id)
        except InputError as error:
            self.checks.add(Check("run", cell.run_id, cell.run_id, error.what, MISSING))
            return NamedRun(cell.run_id)
        self.checks.compare("run's trial", cell.run_id, cell.trial, run.tags.get("trial_key"))
        if not cell.measurement:
            metric = str(cell.metric)
            logged = run.metrics.get(evaluation.logged_as(metric) if evaluation else f"test_{metric}")
            shown = None if cell.value is None else rounded(cell.value)  # as MLflow's metrics are
            self.checks.compare("run's metric", cell.run_id, shown, None if logged is None else rounded(logged))
        return TracedRun(
            run_id=cell.run_id, name=run.name, study=run.tags.get("study"), status=run.status, parent=run.parent,
            adapter_digest=run.tags.get("adapter_digest"), store=self.tracker.address,
        )  # fmt: skip

    def _trial(self, cell: CellResult, evaluation: Evaluation | None) -> Json | None:
        key = str(cell.trial)
        place = f"runs/{key}/config.json"
        try:
            config = self.store.record(key).config
        except HificlError as error:
            self.checks.add(Check("trial", place, key, error.what, MISSING))
            return None
        self.checks.compare("trial's key", place, key, key_of(TrialConfig, config, key))
        if evaluation:
            self.checks.compare("trial's configuration", place, digest(evaluation.config), digest(config))
        return config

    def _adapter(self, cell: CellResult, evaluation: Evaluation | None, run: NamedRun | None) -> TracedAdapter:
        folder = self.store.folder(str(cell.trial)) / "adapter"
        place = folder.relative_to(self.root)
        end = self.store.done(str(cell.trial))
        present = functools.cache(lambda: folder_digest(folder))
        recorded = {
            "at the end of training": end.adapter_digest if end else None,
            "when it was scored": evaluation.adapter_digest if evaluation else None,
            "in MLflow": run.adapter_digest if isinstance(run, TracedRun) else None,
        }
        for when, known in recorded.items():
            if known:
                self.checks.compare(f"adapter (recorded {when})", place, known, present)
        if not any(recorded.values()):
            self.checks.compare("adapter", place, None, present)
        return TracedAdapter(str(place), present(), end.chosen_epoch if end else None)

    def _manifest(self, task: str, wanted: str) -> NamedManifest:
        path = self.root / "data/manifests" / task / "manifest.json"
        place = str(path.relative_to(self.root))
        try:
            manifest = Manifest.load(path)
        except InputError as error:
            state = DIFFERS if path.exists() else MISSING
            self.checks.add(Check("manifest", place, wanted, error.what, state))
            return NamedManifest(place, None)
        self.checks.compare("manifest", place, wanted, manifest.digest)
        base = self.root / manifest.image_root
        files = {source.path: source.sha256 for source in manifest.sources}
        images = {i.path: i.sha256 for rows in manifest.splits.values() for sample in rows for i in sample.images}
        for name, known in files.items():
            self.checks.compare("source file", base / name, known, functools.partial(_digest_of, base / name))
        self._images(base, images)
        return TracedManifest(place, manifest.digest, manifest.seed, str(manifest.image_root), files, len(images))

    def _images(self, base: Path, images: dict[str, str]) -> None:
        wrong = 0
        for name, known in sorted(images.items(), key=lambda item: shard_order(item[0])):
            try:
                present = image_files.image_digest(name, base)  # a file's, or that of a cell in a shard
            except InputError:
                present = None
            if present != known:
                wrong += 1
                self.checks.compare("image", base / name, known, present)
        if not wrong:
            self.checks.add(Check("images", str(base), f"{len(images)} files", f"{len(images)} files", SAME))

    def _backbone(self, name: str, wanted: str) -> TracedBackbone:
        try:
            self.checks.compare(
                "backbone", name, wanted, lambda: backbones.digest_of(name, self.params.backbone_source(name))
            )
        except InputError as error:
            self.checks.add(Check("backbone", name, wanted, error.what, MISSING))
        return TracedBackbone(name, wanted)

    def _code(self, cell: CellResult) -> TracedCode:
        record = self.store.record(str(cell.trial))
        origin = record.provenance
        checkout = code_root(self.root)
        if origin.commit is None:
            self.checks.add(Check("commit", str(checkout), None, origin.note, UNRECORDED))
        else:
            present = origin.commit if has_commit(checkout, origin.commit) else None
            self.checks.compare("commit", checkout, origin.commit, present)
        return TracedCode(
            commit=origin.commit, dirty=origin.dirty, changed=list(origin.changed),
            diff_lines=origin.diff.count("\n"), earlier_commits=list(record.earlier_commits), versions=origin.versions,
        )  # fmt: skip


def _digest_of(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None


NUMBERS = ("value", "std", "seeds", "run_ids")  # the CSV's columns that trials stand behind
_FORM = "Write FILE:ROW:COLUMN, such as reports/hificl-table1.csv:1:value or reports/hificl-table1.csv:hificl:coco"


@dataclass(frozen=True)
class Place:
    """One number of a report.

    Attributes:
        study: the study's name.
        table: the study, laid out from the evaluation files.
        entry: the number.
        file: the report file that was named, or None.
        printed: what stands in the CSV beside the entry; None where there is no CSV row.
    """

    study: str
    table: Table
    entry: TableEntry
    file: Path | None
    printed: str | None


def locate(text: str, params: Params, evaluations: Path) -> Place:
    """Return the number that `FILE:ROW:COLUMN` names.

    ROW is a row's number in the CSV (the first below the header is 1) or a row's name (`hificl`,
    `mini-idefics2/hificl rank=8`); COLUMN is `value` or a task or metric.

    Raises:
        InputError: no such file, row or column, or more than one number fits.
    """
    parts = text.rsplit(":", 2)
    if len(parts) != 3 or not all(parts):
        raise InputError(f"'{text}' names no number", way_out=_FORM)
    file, row, column = Path(parts[0]), parts[1], parts[2]
    if not file.is_file():
        raise InputError("no such file", where=str(file), way_out="Run dvc repro first. " + _FORM)
    if file.suffix not in (".csv", ".md"):
        raise InputError("no table of one study", where=str(file), way_out="Give the study's CSV or Markdown. " + _FORM)
    table = report.load_table(file.stem, params, evaluations)
    rows = _csv_rows(file.with_suffix(".csv"))
    if row.isdigit():
        if not rows or not 1 <= int(row) <= len(rows):
            raise InputError(f"no row {row}; there are {len(rows)}", where=str(file.with_suffix(".csv")), way_out=_FORM)
        entry = _of_csv(table, rows[int(row) - 1], column, str(file))
    else:
        entry = _named(table, row, column, str(file))
    return Place(file.stem, table, entry, file, _printed(rows, entry))


def locate_cell(study: str, cell: str, params: Params, evaluations: Path) -> Place:
    """Return the number `ROW:COLUMN` of a study, by names.

    Raises:
        InputError: no such study, row or column, or more than one number fits.
    """
    row, colon, column = cell.rpartition(":")
    if not colon or not row or not column:
        raise InputError(f"'{cell}' is not of the form ROW:COLUMN", where="--cell", way_out="Write --cell hificl:coco")
    table = report.load_table(study, params, evaluations)
    file = evaluations.parent / "reports" / f"{study}.csv"
    entry = _named(table, row, column, study)
    return Place(study, table, entry, file if file.is_file() else None, _printed(_csv_rows(file), entry))


def every_place(study: str, params: Params, evaluations: Path) -> list[Place]:
    """Return all numbers of a study's report, those that are missing too.

    Raises:
        InputError: the study has not been evaluated.
    """
    table = report.load_table(study, params, evaluations)
    file = evaluations.parent / "reports" / f"{study}.csv"
    rows = _csv_rows(file)
    return [
        Place(study, table, entry, file if rows else None, _printed(rows, entry)) for entry in table.entries.values()
    ]


def _csv_rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def _identity(entry: TableEntry) -> tuple[str, str, str, str]:
    return entry.line.backbone, entry.column.task, entry.line.method, entry.metric


def _of_csv(table: Table, row: dict[str, str], column: str, where: str) -> TableEntry:
    wanted = tuple(row.get(name) or "" for name in ("backbone", "task", "method", "metric"))
    entry = next((entry for entry in table.entries.values() if _identity(entry) == wanted), None)
    if entry is None:
        raise InputError(
            f"the row {' '.join(wanted)} is not in the study's evaluation",
            where=where, way_out="The report is older than the evaluation: run dvc repro",
        )  # fmt: skip
    if column not in (*NUMBERS, entry.column.task, entry.metric):
        known = [*NUMBERS, entry.column.task]
        raise InputError(f"no run stands behind column '{column}'", where=where, way_out=nearest(column, known))
    return entry


def _named(table: Table, row: str, column: str, where: str) -> TableEntry:
    rows = [entry for entry in table.entries.values() if row in _row_names(entry)]
    if not rows:
        known = {entry.line.method for entry in table.entries.values()}
        raise InputError(f"no row '{row}'", where=where, way_out=nearest(row, known))
    entries = [entry for entry in rows if column in _column_names(entry)]
    if not entries:
        known = {entry.column.task for entry in rows}
        raise InputError(f"no column '{column}'", where=where, way_out=nearest(column, known))
    if len(entries) > 1:
        # the task's own score goes before its further metrics
        entries = [entry for entry in entries if entry.column.metric is None] or entries
    if len(entries) > 1:
        fits = ", ".join(f"{e.line.backbone}/{e.line.method}:{e.column.task}" for e in entries[:6])
        raise InputError(
            f"{len(entries)} numbers are called {row}:{column}", where=where, way_out=f"Give one of: {fits}"
        )
    return entries[0]


def _row_names(entry: TableEntry) -> set[str]:
    line = entry.line
    names = {line.row, line.method, line.label, line.title}
    return names | {f"{backbone}/{name}" for name in names for backbone in (line.backbone, line.paper_backbone)}


def _column_names(entry: TableEntry) -> set[str]:
    column = entry.column
    tasks = {column.task, column.paper_task, papers.label("tasks", column.task)}
    metrics = {entry.metric, papers.label("metrics", entry.metric)}
    return tasks | metrics | {f"{task}/{metric}" for task in tasks for metric in metrics} | set(NUMBERS)


def _printed(rows: list[dict[str, str]], entry: TableEntry) -> str | None:
    wanted = _identity(entry)
    names = ("backbone", "task", "method", "metric")
    return next((row.get("value") for row in rows if tuple(row.get(name) or "" for name in names) == wanted), None)


def expected(entry: TableEntry) -> str:
    """Return what the CSV must show for an entry."""
    return number(entry.value)
