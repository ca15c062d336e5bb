"""Which samples of the training split a trial gets, and where that is a part of its key."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.load import load
from pipeline.config.trial import TrialConfig
from pipeline.data.manifest import training_samples
from pipeline.plan.space import Digests, cells
from tests.conftest import ROOT

SPLIT: Any = SimpleNamespace(splits={"train": tuple(range(1000))})
BASE: dict[str, Any] = {
    "backbone": "b",
    "backbone_digest": "0",
    "task": "t",
    "manifest_digest": "1",
    "method": "hificl",
}


def drawn(size: int, seed: int, how: str = "by-seed") -> list[int]:
    config = TrialConfig(**BASE, num_train_samples=size, seed=seed, sample_draw=how)
    return list(training_samples(SPLIT, config))


def test_the_first_ones_are_the_same_for_every_seed() -> None:
    assert drawn(100, 0, "first") == drawn(100, 5, "first") == list(range(100))


def test_each_seed_draws_its_own_and_a_smaller_draw_lies_within_a_larger() -> None:
    small, large = drawn(100, 0), drawn(500, 0)
    assert len(set(small)) == 100 and set(small) < set(large) and small == sorted(small)
    assert drawn(100, 0) == small and len(set(small) & set(drawn(100, 1))) < 30  # 10 by chance
    assert (small[0], sum(small)) == (5, 48800)  # on every machine
    assert drawn(1000, 0) == drawn(1000, 1) == list(range(1000))


@pytest.mark.parametrize(("size", "expected"), [(100, "by-seed"), (1000, "first")])
def test_only_a_part_of_the_split_has_a_draw_in_its_key(size: int, expected: str) -> None:
    known = load(ROOT / "params.yaml", [f"train.num_train_samples={size}", "train.sample_draw=by-seed"])
    names = known.run.backbones, known.run.tasks
    digests = Digests(*({name: name for name in part} for part in names), dict.fromkeys(names[1], 1000))
    trials = {cell.row: cell.trial({}) for cell in cells(known, "miniature-comparison", digests)}
    assert {trial.sample_draw for trial in trials.values()} == {expected} and {"icl-8", "hificl"} <= set(trials)
    teachers = {trials[row].draws for row in ("live", "mimic")}
    assert len(teachers) == 1 and expected in teachers.pop()
