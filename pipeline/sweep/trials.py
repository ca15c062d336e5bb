"""`hificl trials`: what would train and be scored, with every setting and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.config import Params, Scalar
from pipeline.errors import InputError
from pipeline.sweep.forecast import as_given, evaluated_samples
from pipeline.sweep.plan import Places
from pipeline.sweep.run import digests_of, places
from pipeline.sweep.space import PAPERS_FULL_SIZE, Cell, Digests, cells, corners, points
from pipeline.sweep.store import TrialStore
from pipeline.trial import TrialConfig


class TrialRow(BaseModel):
    """One trial of one study, as it would be trained and scored.

    Attributes:
        row: the study's row.
        vary: the point of the study's axes.
        searched: the point of the row's search; of a search that asks for its points one after another, an example.
        key: the trial's key; None where weights or data are not here, which it hangs on.
        num_evaluation: samples that it is scored on.
        done: whether it is trained (or needs no training) and in the store.
        sources: where each setting comes from: train (the default), method, a paper's table or section, profile,
            study, or params.yaml.
    """

    model_config = ConfigDict(frozen=True)

    study: str
    row: str
    backbone: str
    task: str
    method: str
    vary: dict[str, Any]
    searched: dict[str, Any]
    options: dict[str, Any]
    num_shots: int
    num_train_samples: int
    num_selection_samples: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    epochs: int
    micro_batch_size: int
    accumulation: int
    alignment_weight: float
    ground_truth_weight: float
    precision: str
    engine: str
    zero_stage: int
    world_size: int
    selection: str
    seed: int
    num_evaluation: int
    key: str | None
    done: bool
    sources: dict[str, str]

    def facts(self) -> dict[str, Scalar]:
        """Return the settings that a table shows, by name."""
        own = {name: value for name, value in self.options.items() if isinstance(value, bool | int | float | str)}
        shown = ("num_shots", "num_train_samples", "epochs", "learning_rate", "weight_decay", "precision", "seed")
        return {**own, **{name: getattr(self, name) for name in shown}}


def trial_rows(params: Params, studies: Sequence[str]) -> list[TrialRow]:
    """Return every trial of the studies under the profile; of points that a searcher asks for, examples.

    Nothing is read but params.yaml where weights or manifests are missing: no trial is known to be done then.

    Raises:
        InputError: an unknown study, field or option, or settings that no trial can have.
    """
    where = places()
    known = _digests(params, studies, where)
    store = TrialStore(where.runs)
    return [
        row
        for study in studies
        for cell in cells(params, study, known or as_given(params))
        for row in _rows(params, cell, store if known else None)
    ]


def _digests(params: Params, studies: Sequence[str], where: Places) -> Digests | None:
    try:
        return digests_of(params, studies, where)
    except InputError:  # no weights, or nothing drawn
        return None


def _rows(params: Params, cell: Cell, store: TrialStore | None) -> Iterator[TrialRow]:
    asked_later = params.sweep.search == "optuna" and cell.search
    for point in corners(cell) if asked_later else points(cell, params):
        config = cell.trial(point)
        settings = config.model_dump(include=set(TrialRow.model_fields) - {"num_shots", "options"})
        yield TrialRow(
            **settings, study=cell.study, row=cell.row, vary=cell.vary, searched=point, options=config.options,
            num_shots=config.num_shots or int(config.options.get("num_shots", 0)),
            num_evaluation=evaluated_samples(params, cell.task), key=config.key if store else None,
            done=bool(store and store.finished(config.key)), sources=_sources(cell, config),
        )  # fmt: skip


def _sources(cell: Cell, config: TrialConfig) -> dict[str, str]:
    """Return where each setting that the trial uses comes from."""
    fields = [*TrialRow.model_fields, *config.options]
    below = "epochs_below_1000" if config.num_train_samples < PAPERS_FULL_SIZE else "epochs"
    names = {**{name: name for name in fields}, "epochs": below}
    found = {name: cell.sources[own] for name, own in names.items() if own in cell.sources}
    default = {name: "method" if name in config.options else "train" for name in (*_SETTINGS, *config.options)}
    return {**default, **found}


_SETTINGS = (
    "num_shots", "num_train_samples", "num_selection_samples", "learning_rate", "weight_decay", "warmup_ratio",
    "epochs", "micro_batch_size", "accumulation", "precision", "selection",
)  # fmt: skip
