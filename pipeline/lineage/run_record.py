"""What an MLflow run says of itself, read back: configuration, scores, code; and whether what is there agrees."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import JsonValue, ValidationError

from pipeline import methods
from pipeline.config.trial import KEY_LENGTH, EvaluationConfig, TrialConfig, digest
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import Json
from pipeline.records.evaluation import Evaluation
from pipeline.records.trial import EpochReport, Provenance
from pipeline.tracking import store
from pipeline.tracking.client import LEDGER_FILE, Tracker
from pipeline.tracking.records import FINISHED, KILLED, rounded

_SCORED = "evaluation"  # the artifact folder of scores
_OTHER_RUN = "Give another run"


@dataclass(frozen=True)
class RunRecord:
    """A trial that finished, or was stopped after an epoch, by its run's own record.

    Attributes:
        run_id: of the run.
        config: the trial's configuration, as its code version wrote it.
        evaluation: the newest score; None where it was never scored.
        metrics: last values by name, with all their digits.
        provenance: of its code and machine; empty where nothing was recorded.
        tags: the run's tags.
        stopped_after: the epoch after which it was stopped, by hand or by a scheduler; None: it was not.
    """

    run_id: str
    config: Json
    evaluation: Evaluation | None
    metrics: dict[str, float]
    provenance: Provenance
    tags: dict[str, str]
    stopped_after: int | None = None

    @property
    def key(self) -> str:
        """The trial's key."""
        return self.tags["trial_key"]

    @property
    def backbone(self) -> str:
        """The backbone's name."""
        return str(self.config["backbone"])

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.config["task"])

    @property
    def options(self) -> Json:
        """The method's own."""
        return cast(Json, self.config["options"])


def read_record(tracker: Tracker, run_id: str) -> RunRecord:
    """Read a trial's run.

    Raises:
        InputError: no store or no such run, a run that is no trial or did not finish, or a record that does not give
            its key.
    """
    store.require_there(tracker.uri)
    run = tracker.read_run(run_id)
    tags = run.tags
    if tags.get("kind") != "trial":
        raise InputError(
            f"the run is a {tags.get('kind') or 'run of something else'}, not a trial",
            where=run_id, way_out="Give a child run: the report's CSV and `hificl trace` name them",
        )  # fmt: skip
    stopped = int(tags["stopped_after"]) if run.status == KILLED and "stopped_after" in tags else None
    if run.status != FINISHED and not stopped:
        why = tags.get("error")
        raise InputError(f"the run ended as {run.status}{f' ({why})' if why else ''}", where=run_id)
    text = tags.get("trial_config")
    try:
        config = json.loads(text) if text else _from_params(run.params)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its configuration is damaged: {error}", where=run_id, way_out=_OTHER_RUN) from None
    stated = tags.get("trial_key", "")
    if key_of(TrialConfig, config, stated) != stated:
        raise InputError(
            "the run's params do not give its key: they were changed, or another version of the code wrote them",
            where=run_id,
        )
    evaluation = _newest_score(tracker, run_id, run.metrics)
    metrics = exact(tracker, run_id, run.metrics, evaluation)
    return RunRecord(run_id, config, evaluation, metrics, tracker.provenance_of(run_id), tags, stopped)


def exact(tracker: Tracker, run_id: str, metrics: dict[str, float], evaluation: Evaluation | None) -> dict[str, float]:
    """Return a run's metrics with all their digits: MLflow's are rounded, the run's files are not.

    Args:
        tracker: the store.
        run_id: a trial's run.
        metrics: its last values by name.
        evaluation: its newest score.
    """
    lines = (tracker.read_artifact(run_id, LEDGER_FILE) or "").splitlines()
    last = EpochReport.parse(lines[-1], f"{run_id} {LEDGER_FILE}", _OTHER_RUN).metrics if lines else {}
    scores = evaluation.metrics if evaluation else {}
    known = {**last, **{f"test_{name}": value for name, value in scores.items()}}
    unrounded = dict(metrics)
    for name, value in metrics.items():
        whole = known.get(name)
        if isinstance(whole, int | float) and rounded(whole) == rounded(value):
            unrounded[name] = float(whole)
    return unrounded


def _newest_score(tracker: Tracker, run_id: str, metrics: dict[str, float]) -> Evaluation | None:
    newest = None
    for path in tracker.artifacts_of(run_id, _SCORED):
        text = tracker.read_artifact(run_id, path) or "{}"
        if _is_measurement(text):
            continue
        read = Evaluation.parse(text, f"{run_id} {path}", _OTHER_RUN)
        if read.target:  # another task's score of the same adapter
            continue
        newest = read
        logged = metrics.get(f"test_{newest.metric}")
        if logged is not None and newest.value is not None and rounded(logged) == rounded(newest.value):
            return newest
    return newest


def _is_measurement(text: str) -> bool:
    """Whether an artifact is no score; those lie in the same folder."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and ("measure" in fields or "evaluation" not in fields)


def _from_params(params: dict[str, str]) -> Json:
    """Rebuild the configuration of a run of before runs kept it whole."""
    known = set(methods.option_names(params["method"]))
    fields = TrialConfig.model_fields
    options = {name: _parsed(value) for name, value in params.items() if name in known or name not in fields}
    plain = {name: value for name, value in params.items() if name not in options}
    typed = {name: value if fields[name].annotation is str else _parsed(value) for name, value in plain.items()}
    return TrialConfig.model_validate({**typed, "options": options}).model_dump(mode="json")


def _parsed(text: str) -> JsonValue:
    try:
        return json.loads(text)
    except ValueError:
        return text


SAME, DIFFERS, MISSING, UNRECORDED = "same", "differs", "missing", "not recorded"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: what is compared ("adapter", "source file").
        where: the file or the run.
        expected: what was recorded.
        found: what is there.
        state: same, differs, missing or not recorded.
    """

    what: str
    where: str
    expected: str | None
    found: str | None
    state: str

    def sentence(self) -> str:
        """Return what is wrong, in one line."""
        if self.state == MISSING:
            return f"{self.what} {self.where} is missing{f' ({self.found})' if self.found else ''}"
        return f"{self.what} {self.where} is {_short(self.found)}, {_short(self.expected)} was recorded"


class Checks:
    """Collects checks; one that several seeds share is made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str, str | None], Check] = {}

    def compare(self, what: str, where: Path | str, expected: Any, found: Any | Callable[[], Any]) -> Check:
        """Compare `found` (or what it returns) with what was recorded; None found means it is not there."""
        wanted = None if expected is None else str(expected)
        key = (what, str(where), wanted)
        if key not in self._made:
            value = found() if callable(found) else found
            seen = None if value is None else str(value)
            if wanted is None:
                state = UNRECORDED if seen is not None else MISSING
            else:
                state = MISSING if seen is None else SAME if seen == wanted else DIFFERS
            self._made[key] = Check(what, str(where), wanted, seen, state)
        return self._made[key]

    def add(self, check: Check) -> Check:
        """Take up a check that was made elsewhere."""
        return self._made.setdefault((check.what, check.where, check.expected), check)

    @property
    def wrong(self) -> list[Check]:
        """The checks that found something missing or different."""
        return [check for check in self._made.values() if check.state in (DIFFERS, MISSING)]

    @property
    def made(self) -> list[Check]:
        """All of them, in the order in which they were made."""
        return list(self._made.values())


def _short(text: str | None) -> str:
    return str(text) if text is None or len(text) <= 80 else f"{text[:77]}..."


def key_of(kind: type[TrialConfig] | type[EvaluationConfig], stored: Json, stated: str) -> str:
    """Return the key of a stored configuration.

    Code of its own time hashed it as it stands, newer code leaves out later fields at their defaults: where one of the
    two gives `stated`, that is its key.
    """
    plain = digest(stored)[:KEY_LENGTH]
    if plain == stated:
        return plain
    try:
        return kind.model_validate(stored).key
    except ValidationError:
        return plain
