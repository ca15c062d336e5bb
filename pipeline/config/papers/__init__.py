"""What the two papers print: figures (papers.yaml), and hyperparameters (settings.yaml), by rules for their trials."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import Protocol, Scalar, Section
from pipeline.core.plain_yaml import read_file


class Rule(Section):
    """Settings that a paper gives for some of its trials; an empty list stands for all.

    Attributes:
        paper: `hificl` or `mimic`, as in a study's `paper`.
        source: table, figure or section that says so.
        set: training settings and options of the method.
        protocol: the protocol that the rule is a part of; None: it always holds.
    """

    paper: str
    source: str
    set: dict[str, Scalar | dict[str, Scalar]]
    studies: list[str] = []
    methods: list[str] = []
    backbones: list[str] = []
    tasks: list[str] = []
    protocol: str | None = None


class _File(Section):
    rules: list[Rule]
    protocols: dict[str, Protocol]


@functools.cache
def _file() -> _File:
    return _File.model_validate(read_file(Path(__file__).with_name("settings.yaml")))


def protocols() -> dict[str, Protocol]:
    """Return the protocols that ship, by name."""
    return _file().protocols


def rules(
    paper: str | None, study: str, method: str, backbone: str, task: str, protocol: str | None = None
) -> Iterator[Rule]:
    """Give the rules that hold for a trial, the later one winning.

    Args:
        paper: as in a study's `paper`, such as `hificl.table1_main`; None: no rule holds.
        study: the study's name.
        method: the method's name.
        backbone: the paper's backbone.
        task: the paper's task.
        protocol: the protocol that is on.
    """
    name = (paper or "").partition(".")[0]
    asked = {"studies": study, "methods": method, "backbones": backbone, "tasks": task}
    for rule in _file().rules:
        fits = all(not getattr(rule, kind) or value in getattr(rule, kind) for kind, value in asked.items())
        if rule.paper == name and fits and rule.protocol in (None, protocol):
            yield rule
