"""Recorded trials: one by itself, trained and scored from its own JSON; and what is done to one by hand.

A trial can be stopped and let go on, also while a sweep trains it, which looks at the ledger before each epoch. One
that is made from another is a row of the study `by-hand`, which holds it whole. Every act stands in the ledger.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from pipeline import backbones, methods
from pipeline.config.load import FOLDERS, Explicit, Params, Study, StudyMethod, Train, with_study
from pipeline.config.trial import EvaluationConfig, TrialConfig
from pipeline.core import plain_yaml
from pipeline.core.errors import InputError, nearest, validate
from pipeline.core.files import write_atomic
from pipeline.core.locks import held
from pipeline.plan.plan import places
from pipeline.pool.supervisor import Drivers
from pipeline.records import part_of
from pipeline.records.evaluation import Evaluation, Evaluations
from pipeline.records.journal import Journal
from pipeline.records.store import TrialStore
from pipeline.records.trial import Act
from pipeline.sweep.evaluate import evaluate
from pipeline.sweep.train import BY_HAND, sweep
from pipeline.tasks import tasks
from pipeline.tracking.provenance import provenance
from pipeline.train import checkpoint

STUDY = "again"  # what the trial's one row stands in
_SHORTEST = 4  # digits that may stand for a key
# settings that a clone may change; the others decide which samples, weights or machine a trial has
_CHANGED = (
    "seed", "epochs", "learning_rate", "weight_decay", "warmup_ratio", "gradient_clip", "micro_batch_size",
    "accumulation", "alignment_weight", "ground_truth_weight",
)  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """A trial, and how it is scored; None: as params.yaml has it."""

    config: TrialConfig
    evaluation: EvaluationConfig | None = None


def read_recorded(trial: Path, evaluation: Path | None = None) -> Recorded:
    """Read `runs/KEY/config.json` and `evaluations/KEY.json`, or files of the configurations alone.

    Raises:
        InputError: no such file, no JSON, or a field that this code does not know.
    """
    config = validate(TrialConfig, part_of(trial, "config"), str(trial), noun="field")
    if evaluation is None:
        return Recorded(config)
    return Recorded(
        config, validate(EvaluationConfig, part_of(evaluation, "evaluation"), str(evaluation), noun="field")
    )


def params_of(recorded: Recorded, params: Params) -> Params:
    """Return parameters whose one study is the trial; weights, sweep and tracking are those of `params`."""
    config = recorded.config
    row = StudyMethod(method=config.method, trial=config, evaluation=recorded.evaluation)
    backbone, task = backbones.get(config.backbone).stands_for or config.backbone, tasks.get(config.task).stands_for
    title, rows, seeds = f"Trial {config.key}", {config.method: row}, [config.seed]
    study = Study(title=title, methods=rows, seeds=seeds, backbones=[backbone], tasks=[task])
    run = {"backbones": [config.backbone], "tasks": [config.task], "studies": [STUDY], "stand_ins": {}}
    return params.model_copy(
        update={"run": params.run.model_copy(update=run), "explicit": Explicit(), "studies": {STUDY: study}}
    )


def train_recorded(
    recorded: Recorded, params: Params, drivers: Drivers, root: Path | None = None, *, stop_after: int | None = None
) -> None:
    """Train the trial, unless the store has it; where it was stopped, no further than it was.

    Raises:
        InputError: weights, samples or cluster are not in order, or not those of the record.
        WorkError: it failed.
    """
    if stop_after is not None:
        stop(TrialStore(places(root).runs), recorded.config.key, stop_after)
    sweep(params_of(recorded, params), [STUDY], drivers, root)


def score_recorded(
    recorded: Recorded, params: Params, drivers: Drivers, root: Path | None = None
) -> tuple[str, Evaluation]:
    """Score the trial, unless that is done, and return the score's key and the score.

    Raises:
        InputError: as `train_recorded`.
        WorkError: it is not trained, or could not be scored.
    """
    root = root or Path.cwd()
    evaluate(params_of(recorded, params), [STUDY], drivers, root)
    evaluations = Evaluations(root / "evaluations")
    (cell,) = evaluations.study(STUDY).cells
    key = cell.evaluation or ""
    return key, evaluations.read(key)


def full_key(store: TrialStore, begun: str) -> str:
    """Return the key of the one trial that begins so.

    Raises:
        InputError: there is none, or there are several.
    """
    keys = [key for key in store.all_keys() if key.startswith(begun)] if len(begun) >= _SHORTEST else []
    if len(keys) == 1:
        return keys[0]
    why = f"{len(keys)} trials begin so" if keys else "no such trial"
    way_out = f"Give {_SHORTEST} digits or more of a folder's name; `hificl trials` lists the keys of studies"
    raise InputError(why, where=f"{store.root}/{begun}", way_out=way_out)


def stop(store: TrialStore, key: str, after: int | None = None) -> Act:
    """Stop a trial behind the epoch in which it is, or behind epoch `after`.

    Raises:
        InputError: it has ended, or there is no such epoch.
        WorkError: the ledger cannot be written.
    """
    if after is not None and after < 1:
        raise InputError(f"{after} is no epoch", where="--after", way_out="Give 1 or more")
    end = store.done(key)
    if end is not None and end.final:
        raise InputError(f"has ended: {end.status}", where=f"{store.root}/{key}")
    return _kept(store, Act(time=time.time(), act="stop", trial=key, after=after))


def resume(store: TrialStore, key: str) -> Act:
    """Let a trial go on that was stopped by hand: in the sweep that runs, or in the next one.

    Raises:
        InputError: it was not stopped.
        WorkError: the ledger cannot be written.
    """
    if store.stop_of(key) is None:
        raise InputError("was not stopped by hand", where=f"{store.root}/{key}")
    return _kept(store, Act(time=time.time(), act="resume", trial=key))


def clone(root: Path, params: Params, key: str, changes: Mapping[str, JsonValue]) -> Act:
    """Add a trial like another but for `changes` to the study `by-hand`.

    Args:
        root: the project's folder.
        params: the project's.
        key: of the trial that is changed.
        changes: values of the method's options and of training settings, by name.

    Raises:
        InputError: a change that there cannot be, or none.
        WorkError: the study or the ledger cannot be written.
    """
    config = TrialStore(places(root).runs).config(key)
    return _made(root, params, config, changed(config, changes), "clone", dict(changes))


def clones(root: Path, params: Params, key: str, grid: Mapping[str, Sequence[JsonValue]]) -> list[Act]:
    """Add a trial like another for each point of a grid, as `clone` does; those that are there are passed over.

    Args:
        root: the project's folder.
        params: the project's.
        key: of the trial that is changed.
        grid: the values of each setting.

    Raises:
        InputError: a setting has no value, a point cannot be (nothing is added then), or all of them are there.
        WorkError: as `clone`.
    """
    store, study = TrialStore(places(root).runs), with_study(params, BY_HAND, root).studies.get(BY_HAND)
    if empty := [name for name, values in grid.items() if not values]:
        raise InputError("no value", where=f"--grid {empty[0]}", way_out="Such as --grid learning_rate=0.01,0.02")
    config, there = store.config(key), {key, *(study.methods if study else ())}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    new = {child.key: point for point in points if (child := changed(config, point)).key not in there}
    if not new:
        raise InputError(f"all {len(points)} of them are there", where=f"{store.root}/{key}")
    return [clone(root, params, key, point) for point in new.values()]


def grid_of(values: Mapping[str, str], place: str) -> dict[str, list[JsonValue]]:
    """Return the values of each setting from a text that has commas between them.

    Raises:
        InputError: one is no YAML.
    """
    return {name: plain_yaml.read(f"[{text}]", f"{place} {name}") for name, text in values.items()}


def extend(root: Path, params: Params, key: str, epochs: int) -> Act:
    """Add a trial that goes on where another one ended, to `epochs` in all, to the study `by-hand`.

    Its learning rate is that of a trial of so many epochs, at the same steps.

    Raises:
        InputError: the trial has not finished, has as many epochs, or has no checkpoint of its last one.
        WorkError: the study or the ledger cannot be written.
    """
    store = TrialStore(places(root).runs)
    config, end, folder = store.config(key), store.done(key), f"{store.root}/{key}"
    if end is None or end.status != "finished" or not config.trained:
        why = "needs no training" if not config.trained else "open" if end is None else end.status
        raise InputError(f"has no last epoch to go on from: {why}", where=folder)
    if epochs <= config.epochs:
        raise InputError(f"the trial has {config.epochs}", where=f"--epochs {epochs}", way_out="Give more of them")
    if config.epochs not in checkpoint.epochs(store.trial(key).checkpoint):
        raise InputError("its last checkpoint is gone", where=folder, way_out="Clone it with more epochs instead")
    child = config.model_copy(update={"epochs": epochs, "parent": key})
    return _made(root, params, config, child, "extend", {"epochs": epochs})


def changed(config: TrialConfig, changes: Mapping[str, JsonValue]) -> TrialConfig:
    """Return a trial with other settings.

    Raises:
        InputError: no such setting, a value that it cannot have, or one that changes what the trial has a teacher for.
    """
    options = methods.option_names(config.method)
    training = [name for name in _CHANGED if config.trained or name == "seed"]
    known = {*options, *training}
    for name in changes:
        if name not in known:
            raise InputError(f"no setting '{name}' to change", where="--set", way_out=nearest(name, known))
    given = {name: value for name, value in changes.items() if name in options}
    parsed = methods.parse(config.method, {**config.options, **given})
    settings = {name: value for name, value in changes.items() if name not in options}
    validate(Train, {name: value for name, value in settings.items() if name != "seed"}, "--set")  # their ranges
    fields = {**config.model_dump(), **settings, "options": parsed.plain(), "parent": ""}
    child = validate(TrialConfig, fields, "--set", noun="field")
    if methods.facts(child).teacher != methods.facts(config).teacher or (
        "alignment_weight" in changes and not methods.facts(config).teacher
    ):
        raise InputError("another teacher needs settings that the trial does not have", where="--set",
                         way_out="Write a study (docs/studies.md)")  # fmt: skip
    return child


def _made(
    root: Path, params: Params, parent: TrialConfig, child: TrialConfig, act: str, changes: dict[str, JsonValue]
) -> Act:
    """Add a trial to the study of what was made by hand, and to the ledger."""
    store = TrialStore(places(root).runs)
    done = Act.model_validate({
        "time": time.time(), "act": act, "trial": child.key, "parent": parent.key, "changes": changes,
    })  # fmt: skip
    with held(store.root / ".by-hand", "an act by hand"):  # two at once would lose a row
        study = with_study(params, BY_HAND, root).studies.get(BY_HAND)
        rows = study.methods if study else {}
        if child.key in rows or child.key == parent.key:
            raise InputError(f"is trial {child.key} as it stands", where=f"{store.root}/{parent.key}")
        label = f"{parent.method}: {done.told}"
        rows = {**rows, child.key: StudyMethod(method=child.method, label=label, trial=child)}
        trials = [row.trial for row in rows.values() if row.trial is not None]
        study = Study(
            title="Made by hand from other trials", methods=rows,
            backbones=sorted({backbones.get(trial.backbone).stands_for or trial.backbone for trial in trials}),
            tasks=sorted({tasks.get(trial.task).stands_for for trial in trials}),
        )  # fmt: skip
        fields = study.model_dump(mode="json", exclude_defaults=True)
        write_atomic(root / FOLDERS["studies"] / f"{BY_HAND}.yaml", plain_yaml.write(fields))
        store.open(child, provenance(root))
    return _kept(store, done)


def _kept(store: TrialStore, act: Act) -> Act:
    """Write an act down, and tell a sweep that runs."""
    store.act(act)
    Journal(store.root).note("by hand", trial=act.trial, act=act.told)
    return act
