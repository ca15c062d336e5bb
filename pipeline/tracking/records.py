"""What the client of MLflow is given, and what it gives back: a run to open, points to log, a run that was read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import Dataset, DatasetInput, InputTag, Run

from pipeline.config.trial import digest
from pipeline.core.errors import InputError
from pipeline.data.image_files import thumbnail
from pipeline.records.evaluation import Prediction
from pipeline.records.trial import Provenance

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"  # how a run ends
EVALUATIONS = "evaluations"  # the tag that names the evaluations and measurements that a run has
CONTEXT = "mlflow.data.context"
_DIGEST = 12  # characters that the page shows; MLflow itself takes eight, the whole digest stands in the source


@dataclass(frozen=True)
class RunInput:
    """Some samples of a manifest, as a dataset input of a run.

    Attributes:
        name: the task and the split.
        source: the manifest's path, relative to the project.
        digest: the manifest's.
        context: training, demonstrations, selection or evaluation.
        samples: which of the manifest's.
        rows: how many; None where that is not known.
    """

    name: str
    source: str
    digest: str
    context: str
    samples: str = ""
    rows: int | None = None

    def to_mlflow(self) -> DatasetInput:
        """Return MLflow's own form."""
        source = json.dumps({"uri": self.source, "digest": self.digest, "samples": self.samples})
        short = digest([self.digest, self.samples])[:_DIGEST]
        profile = None if self.rows is None else json.dumps({"num_rows": self.rows})
        return DatasetInput(
            Dataset(self.name, short, "local", source, profile=profile), [InputTag(CONTEXT, self.context)]
        )


class MetricPoint(NamedTuple):
    """One value of a metric at an epoch or an optimiser step; one that is None is not logged."""

    name: str
    step: int
    value: float | None


@dataclass(frozen=True)
class TrialRunStart:
    """What the run of a trial is opened with.

    Attributes:
        key: the trial's content key.
        name: what the run is called.
        params: what the number depends on; logged once, since MLflow lets no parameter change.
        inputs: the samples that the trial uses.
        tags: further tags.
        description: what the run's page says (Markdown); what leads on from it follows.
        made_by: provenance of the process that started the trial; None: of this one. A sweep that only finds a trial
            done must not put its own commit on it.
    """

    key: str
    name: str
    params: Mapping[str, object] = field(default_factory=dict)
    inputs: Sequence[RunInput] = ()
    tags: Mapping[str, object] = field(default_factory=dict)
    description: str = ""
    made_by: Provenance | None = None


@dataclass(frozen=True)
class LoggedInput:
    """A dataset input as a run has it; the attributes are `RunInput`'s, `digest` and `source` as MLflow keeps them."""

    name: str
    digest: str
    source: str
    context: str


@dataclass(frozen=True)
class LoggedRun:
    """A run as the store has it: times in ms since 1970, all parameters as text, each metric's last value and step."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    start_time: int
    end_time: int | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    metric_steps: dict[str, int]
    inputs: tuple[LoggedInput, ...]

    @classmethod
    def of(cls, run: Run) -> LoggedRun:
        """Return MLflow's own record as one of these."""
        known = run.inputs.dataset_inputs if run.inputs else []
        inputs = tuple(
            LoggedInput(row.dataset.name, row.dataset.digest, row.dataset.source, _context(row)) for row in known
        )
        return cls(
            run.info.run_id, run.info.experiment_id, run.info.run_name, run.info.status, run.info.start_time,
            run.info.end_time, dict(run.data.params), dict(run.data.tags), dict(run.data.metrics),
            {metric.key: metric.step for metric in run.data._metric_objs}, inputs,
        )  # fmt: skip

    @property
    def trial_key(self) -> str:
        """The key of the trial whose run this is; empty for another run."""
        return self.tags.get("trial_key", "")

    @property
    def study(self) -> str:
        """The study that asked for it; empty for a run of something else."""
        return self.tags.get("study", "")

    @property
    def parent(self) -> str | None:
        """The id of the sweep's run."""
        return self.tags.get("mlflow.parentRunId")

    @property
    def evaluations(self) -> frozenset[str]:
        """The keys of the evaluations and measurements that were logged with it."""
        return frozenset(self.tags.get(EVALUATIONS, "").split())

    @property
    def rank(self) -> tuple[bool, int, str]:
        """What the runs of one trial are put in order by: finished ones last, then the newest."""
        return self.status == FINISHED, self.start_time, self.run_id


def missing_inputs(known: Sequence[LoggedInput], wanted: Iterable[RunInput]) -> list[DatasetInput]:
    """Return the inputs that a run lacks, in MLflow's own form.

    An input from before samples were told apart stands for everything of its context.
    """
    there = {(entry.digest, entry.context) for entry in known}
    whole = {entry.context for entry in known if "samples" not in json.loads(entry.source)}
    new = [entry.to_mlflow() for entry in wanted if entry.context not in whole]
    return [entry for entry in new if (entry.dataset.digest, _context(entry)) not in there]


def text_of(value: object) -> str:
    """Return a value as MLflow's params and tags hold it: a string as it is, else JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _context(entry: DatasetInput) -> str:
    return next((tag.value for tag in entry.tags if tag.key == CONTEXT), "")


def rounded(value: float) -> float:
    """Return `value` to six significant digits; a whole number as it is."""
    value = float(value)
    return value if value.is_integer() else float(f"{value:.6g}")


FILE, IMAGES = "answers.json", "table_images/answers"
TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": FILE, "type": "table"}])}
SAMPLES = 16  # of an evaluation, evenly spread over it: the same ones for all trials of a task
_SIDE, _TEXT = 128, 600  # pixels of a thumbnail, characters of a text: at most 0.3 MB a table
_COLUMNS = ("sample", "image", "answer", "references", "score", "question")  # answers are compared first, by sample


def write_answers(predictions: Sequence[Prediction], project: Path, out: Path) -> bool:
    """Write the table of an evaluation and its thumbnails below `out`; return whether it has answers at all.

    The layout is that of MLflow's `log_table`, which itself adds rows to a table that is there, so that a score that is
    logged again would double it, and keeps every picture twice.

    Args:
        predictions: the evaluation's.
        project: what paths of pictures are relative to. A picture that is gone leaves its cell empty.
        out: a folder.
    """
    number = min(SAMPLES, len(predictions))
    if number == 0:
        return False
    rows = []
    for index in range(number):
        answer = predictions[index * len(predictions) // number]
        picture = _picture(project / answer.image, index, out) if answer.image else None
        rows.append([
            str(answer.sample_id), picture, _short(answer.prediction),
            _short("; ".join(dict.fromkeys(answer.references))),
            None if answer.score is None else rounded(answer.score), _short(answer.question),
        ])  # fmt: skip
    (out / FILE).write_text(json.dumps({"columns": _COLUMNS, "data": rows}, ensure_ascii=False), encoding="utf-8")
    return True


def _picture(path: Path, number: int, out: Path) -> dict[str, str] | None:
    data = _thumbnail(path)
    if data is None:
        return None
    name = f"{IMAGES}/{number:02d}.webp"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(data)
    return {"type": "image", "filepath": name, "compressed_filepath": name}


@functools.lru_cache(maxsize=256)
def _thumbnail(path: Path) -> bytes | None:
    return thumbnail(path, _SIDE, "WEBP", quality=80)


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"


def pages(call: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Yield the entries of all pages that a search of MLflow's answers with."""
    token = None
    while True:
        answer = call(*arguments, page_token=token)
        yield from answer
        token = answer.token
        if not token:
            return


def plain(value: str) -> str:
    """Return `value` if it can stand in a filter of MLflow, which knows no escaping."""
    if "'" in value:
        raise InputError(f"{value!r} must not hold a quotation mark", where="a run's key")
    return value


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield `items` in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
