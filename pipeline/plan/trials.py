"""What would train and be scored: every trial of a study, with each setting and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.config.load import Params
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import Json
from pipeline.plan.plan import Inputs, Places, as_given, evaluated_samples
from pipeline.plan.settings import TRAIN_FIELDS
from pipeline.plan.space import PAPERS_FULL_SIZE, Cell, Digests, Point, cells, corners, points

_DIGESTS = {"backbone_digest", "manifest_digest"}


@dataclass(frozen=True)
class TrialRow:
    """One trial of one study, as it would be trained and scored.

    Attributes:
        row: the study's row.
        vary: the point of the study's axes.
        searched: the point of the row's search; of a search that asks for its points one after another, an example.
        trial: its configuration.
        num_shots: demonstrations that a teacher sees, or that the method itself shows.
        num_evaluation: samples that it is scored on.
        key: the trial's key; None where weights or data are not here, which it hangs on.
        done: whether it is trained (or needs no training) and in the store.
        sources: where each setting comes from: train (the default), method, a paper's table or section, profile,
            study, or params.yaml.
    """

    study: str
    row: str
    vary: Point
    searched: Point
    trial: TrialConfig
    num_shots: int
    num_evaluation: int
    key: str | None
    done: bool
    sources: dict[str, str]

    def record(self) -> Json:
        """Return all settings of the trial, and what is known of it beside them."""
        return {
            "study": self.study, "row": self.row, "vary": self.vary, "searched": self.searched,
            **self.trial.model_dump(mode="json", exclude=_DIGESTS), "num_shots": self.num_shots,
            "num_evaluation": self.num_evaluation, "key": self.key, "done": self.done, "sources": self.sources,
        }  # fmt: skip


def trial_rows(
    params: Params, studies: Sequence[str], where: Places, finished: Callable[[str], bool]
) -> list[TrialRow]:
    """Return every trial of the studies under the profile; of points that a searcher asks for, examples.

    Nothing is read but params.yaml where weights or manifests are missing: no trial is known to be done then.

    Args:
        params: the project's.
        studies: their names.
        where: the project's places.
        finished: whether the store has the trial of a key.

    Raises:
        InputError: an unknown study, field or option, or settings that no trial can have.
    """
    known = _digests(params, studies, where)
    return [
        row
        for study in studies
        for cell in cells(params, study, known or as_given(params))
        for row in _rows(params, cell, finished if known else None)
    ]


def _digests(params: Params, studies: Sequence[str], where: Places) -> Digests | None:
    try:
        return Inputs(params, where).digests(studies)
    except InputError:  # no weights, or nothing drawn
        return None


def _rows(params: Params, cell: Cell, finished: Callable[[str], bool] | None) -> Iterator[TrialRow]:
    asked_later = params.sweep.search == "optuna" and cell.search
    for point in corners(cell) if asked_later else points(cell, params):
        trial = cell.trial(point)
        yield TrialRow(
            study=cell.study, row=cell.row, vary=cell.vary, searched=point, trial=trial,
            num_shots=trial.num_shots or int(trial.options.get("num_shots", 0)),
            num_evaluation=evaluated_samples(params, cell.task), key=trial.key if finished else None,
            done=finished is not None and finished(trial.key), sources=_sources(cell, trial),
        )  # fmt: skip


def _sources(cell: Cell, trial: TrialConfig) -> dict[str, str]:
    """Return where each setting that the trial uses comes from."""
    fields = [name for name in TrialConfig.model_fields if name in TRAIN_FIELDS]
    default = dict.fromkeys(fields, "train") | dict.fromkeys(trial.options, "method")
    below = "epochs_below_1000" if trial.num_train_samples < PAPERS_FULL_SIZE else "epochs"
    asked = {**{name: name for name in default}, "epochs": below}
    won = {name: cell.sources[setting] for name, setting in asked.items() if setting in cell.sources}
    chosen_on = "num_selection_samples"
    if chosen_on not in cell.search and 0 < trial.num_selection_samples < cell.train.num_selection_samples:
        won[chosen_on] = "subsample.num_selection, which is less"
    return {**default, **won}
