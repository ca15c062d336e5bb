"""`Reports`: a study's tables and figures with its runs, and the columns that sort into its table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run, RunTag

from pipeline.digests import folder_digest
from pipeline.rounding import rounded
from pipeline.tracking.connection import plain
from pipeline.tracking.models import Models
from pipeline.tracking.showing import REPORT
from pipeline.tracking.writing import text_of

_PLACE = ("table.row", "table.column")  # tags
_METRIC = re.compile(r"[^\w./ :-]")  # what MLflow does not allow in a metric's name


@dataclass(frozen=True)
class Shown:
    """One number of a study's table at one seed.

    Attributes:
        run_id: the trial's run.
        row: the table's row, its number first, so that sorting by it gives the table.
        column: the table's column likewise.
        value: in the table's unit.
    """

    run_id: str
    row: str
    column: str
    value: float


class Reports(Models):
    """Logs reports; see `Connection` for the arguments."""

    def log_report(self, study: str, folder: Path, shown: Sequence[Shown], means: Mapping[str, float]) -> bool:
        """Keep a study's report with its newest parent run, and tag the runs with their places in the table.

        A run that several studies share lies in the experiment of the study that asked for it first, and is tagged as
        that study has it. What was logged already is not logged again.

        Args:
            study: its name.
            folder: the report's files.
            shown: the table's numbers by run.
            means: the table's numbers over seeds by name, the parent's metrics.

        Returns:
            Whether anything was logged: False where the study has no parent run, or its report is there already.
        """
        parents = self._search(f"tags.kind = 'sweep' and tags.study = '{plain(study)}'")
        if not parents:
            return False
        parent = max(parents, key=lambda run: (run.info.start_time, run.info.run_id))
        digest = folder_digest(folder)
        if parent.data.tags.get("report_digest") == digest:
            return False
        with self._talking():
            self._client.log_artifacts(parent.info.run_id, str(folder), REPORT)
        values = {f"{REPORT}/{_METRIC.sub('-', name)}": value for name, value in means.items()}
        self.log_evaluation(parent.info.run_id, values, None)
        trials = self._search("tags.kind = 'trial'", [parent.info.experiment_id])
        children = {run.info.run_id: run for run in trials}
        places = {one.run_id: one for one in reversed(shown)}  # a run in two rows: the first
        for run_id, run in children.items():
            if run_id in places:
                self._place(run, places[run_id])
            else:
                self._displace(run)
        self.tag(parent.info.run_id, {"report_digest": digest})  # last: what was cut off is logged again
        return True

    def _displace(self, run: Run) -> None:
        with self._talking():
            for key in _PLACE:
                if key in run.data.tags:  # of a table of before
                    self._client.delete_tag(run.info.run_id, key)

    def _place(self, run: Run, one: Shown) -> None:
        tags = dict(zip(_PLACE, (one.row, one.column), strict=True))
        changed = [RunTag(key, text_of(value)) for key, value in tags.items() if run.data.tags.get(key) != value]
        if changed:
            with self._talking():
                self._client.log_batch(run.info.run_id, tags=changed)
        known = run.data.metrics.get("table_value")
        if known is None or rounded(known) != rounded(one.value):
            self.log_evaluation(run.info.run_id, {"table_value": one.value}, None)
