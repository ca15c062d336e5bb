"""What a run was made from, as MLflow's dataset inputs: which samples of a manifest, and what they were for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NotRequired, TypedDict

from mlflow.entities import Dataset, DatasetInput, InputTag

from pipeline.trial import digest

_DIGEST = 12  # characters that the page shows; MLflow itself takes eight, the whole digest stands in the source
CONTEXT = "mlflow.data.context"


class Input(TypedDict):
    """Some samples of a manifest; plain values, for it may have to wait in the spool.

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
    samples: NotRequired[str]
    rows: NotRequired[int | None]


def missing(known: Iterable[DatasetInput], wanted: Iterable[Input]) -> list[DatasetInput]:
    """Return the inputs that a run does not have yet; one of before samples were told apart stands for its context."""
    known = list(known)
    there = {(one.dataset.digest, _context(one)) for one in known}
    whole = {_context(one) for one in known if "samples" not in json.loads(one.dataset.source)}
    new = [_input(one) for one in wanted if one["context"] not in whole]
    return [one for one in new if (one.dataset.digest, _context(one)) not in there]


def _input(one: Input) -> DatasetInput:
    which, rows = one.get("samples", ""), one.get("rows")
    source = json.dumps({"uri": one["source"], "digest": one["digest"], "samples": which})
    short = digest([one["digest"], which])[:_DIGEST]
    profile = None if rows is None else json.dumps({"num_rows": rows})
    dataset = Dataset(one["name"], short, "local", source, profile=profile)
    return DatasetInput(dataset, [InputTag(CONTEXT, one["context"])])


def _context(one: DatasetInput) -> str:
    return next((tag.value for tag in one.tags if tag.key == CONTEXT), "")
