"""`hificl trials`: what would train and be scored, with every setting and where it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.commands.parser import CommandLine, profile_name, settable, study_names
from pipeline.core.terminal import Answer, short, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from pipeline.plan.trials import TrialRow

_SHOWN = (
    "task", "backbone", "num_train_samples", "num_shots", "epochs", "learning_rate", "weight_decay", "precision",
    "seed", "num_evaluation",
)  # fmt: skip


def register(line: CommandLine) -> None:
    """Add the verb."""
    parser = line.verb("look", "trials", trials, "what would train: every setting, and where it is from", answers=True)
    study_names(parser.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)"))
    profile_name(parser.add_argument("--profile", metavar="P", help="a profile (default: params.yaml's)"))
    settable(parser)


def trials(args: argparse.Namespace) -> Trials:
    """Return the trials of some studies."""
    from pipeline.config.load import load
    from pipeline.plan.inputs import places
    from pipeline.plan.trials import trial_rows
    from pipeline.records.store import TrialStore

    params, where = load(overrides=args.set, profile=args.profile), places()
    studies = args.study or params.run.studies
    return Trials(trial_rows(params, studies, where, TrialStore(where.runs).finished))


@dataclass(frozen=True)
class Trials(Answer):
    """The trials of some studies."""

    rows: list[TrialRow]

    def record(self) -> list[dict[str, Any]]:
        """Return a record a trial."""
        return [row.record() for row in self.rows]

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
        shown = " ".join(f"{name}={option[name]}" for name in own if name in option)
        cells = [*(fact[name] for name in differ), *([shown] if own else [])]
        made.add_row(row.row, *cells, "yes" if row.done else "")
    return made


def _by_setting(rows: Sequence[TrialRow]) -> Table:
    """Return a row a setting: its values, and where they come from."""
    facts = [{**_settings(row), **_options(row)} for row in rows]
    made = table("setting", "value", "from")
    for name in dict.fromkeys(name for fact in facts for name in fact):
        having = [(row, fact[name]) for row, fact in zip(rows, facts, strict=True) if name in fact]
        values = dict.fromkeys(value for _, value in having)
        sources = dict.fromkeys(row.sources[name] for row, _ in having if name in row.sources)
        made.add_row(name, ", ".join(values), ", ".join(sources) or "the study and the profile")
    return made


def _differing(facts: Sequence[Mapping[str, str]]) -> list[str]:
    names = dict.fromkeys(name for fact in facts for name in fact)
    return [name for name in names if len({fact[name] for fact in facts if name in fact}) > 1]


def _settings(row: TrialRow) -> dict[str, str]:
    """Return what all methods have, as a table shows it."""
    record = row.record()
    return {name: short(record[name]) for name in _SHOWN}


def _options(row: TrialRow) -> dict[str, str]:
    """Return the method's own options."""
    return {name: short(value) for name, value in row.trial.options.items() if not isinstance(value, dict | list)}
