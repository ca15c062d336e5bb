"""`hificl trials`: what would train and be scored, with every setting and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pipeline.config import Params
from pipeline.errors import InputError
from pipeline.plan.inputs import Inputs, Places, as_given, evaluated_samples, places
from pipeline.plan.space import PAPERS_FULL_SIZE, Cell, Digests, cells, corners, points
from pipeline.sweep.store import TrialStore
from pipeline.terminal import Answer, short, table
from pipeline.trial import TrialConfig

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


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


@dataclass(frozen=True)
class Trials(Answer):
    """The trials of some studies."""

    rows: list[TrialRow]

    def record(self) -> list[dict[str, Any]]:
        """Return a record a trial."""
        return [row.model_dump(mode="json") for row in self.rows]

    def shown(self) -> Iterator[RenderableType]:
        """Give each study's trials by what differs between them, and below every setting and where it comes from."""
        for study in dict.fromkeys(row.study for row in self.rows):
            rows = [row for row in self.rows if row.study == study]
            yield f"{study}: {len(rows)} trials, {sum(row.done for row in rows)} done\n"
            yield _by_trial(rows)
            yield ""
            yield _by_setting(rows)
            yield ""


def _by_trial(rows: Sequence[TrialRow]) -> Table:
    """Return a row a trial, with the settings that are not the same in all that have them."""
    facts, options = [_settings(row) for row in rows], [_options(row) for row in rows]
    differ, own = _differing(facts), _differing(options)
    heads = [name.replace("_", "\n") for name in differ]  # narrow as the numbers below them
    made = table("row", *heads, *(["options"] if own else []), "done", right=heads[differ.count("task") :])
    for row, fact, option in zip(rows, facts, options, strict=True):
        mine = " ".join(f"{name}={option[name]}" for name in own if name in option)
        cells = [*(fact[name] for name in differ), *([mine] if own else [])]
        made.add_row(row.row, *cells, "yes" if row.done else "")
    return made


def _by_setting(rows: Sequence[TrialRow]) -> Table:
    """Return a row a setting: its values, and where they come from."""
    facts = [{**_settings(row), **_options(row)} for row in rows]
    made = table("setting", "value", "from")
    for name in dict.fromkeys(name for one in facts for name in one):
        having = [(row, one[name]) for row, one in zip(rows, facts, strict=True) if name in one]
        values = dict.fromkeys(value for _, value in having)
        sources = dict.fromkeys(row.sources[name] for row, _ in having if name in row.sources)
        made.add_row(name, ", ".join(values), ", ".join(sources) or "the study and the profile")
    return made


def _differing(facts: Sequence[Mapping[str, str]]) -> list[str]:
    names = dict.fromkeys(name for one in facts for name in one)
    return [name for name in names if len({one[name] for one in facts if name in one}) > 1]


def _settings(row: TrialRow) -> dict[str, str]:
    """Return what all methods have, as a table shows it."""
    return {name: short(getattr(row, name)) for name in _SHOWN}


def _options(row: TrialRow) -> dict[str, str]:
    """Return the method's own options."""
    return {name: short(value) for name, value in row.options.items() if not isinstance(value, dict | list)}


_SHOWN = (
    "task", "backbone", "num_train_samples", "num_shots", "epochs", "learning_rate", "weight_decay", "precision",
    "seed", "num_evaluation",
)  # fmt: skip


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
        return Inputs(params, where).digests(studies)
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
    chosen_on = "num_selection_samples"
    if chosen_on not in cell.search and 0 < config.num_selection_samples < cell.train.num_selection_samples:
        found[chosen_on] = "subsample.num_selection, which is less"
    return {**default, **found}


_SETTINGS = (
    "num_shots", "num_train_samples", "num_selection_samples", "learning_rate", "weight_decay", "warmup_ratio",
    "epochs", "micro_batch_size", "accumulation", "precision", "selection",
)  # fmt: skip
