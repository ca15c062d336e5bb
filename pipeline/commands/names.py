"""`hificl methods`, `hificl backbones`, `hificl tasks`: what can be named; `hificl completion`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.parser import CommandLine
from pipeline.core.terminal import Rows


def register(line: CommandLine) -> None:
    """Add the verbs."""
    text = "what adapts a model: every method and its options"
    line.verb("names", "methods", _of_methods, text, answers=True)
    text = "what is adapted: backbones, and classes of any checkpoint"
    line.verb("names", "backbones", _of_backbones, text, answers=True)
    text = "what is asked: every task and its score"
    line.verb("names", "tasks", _of_tasks, text, answers=True)

    parser = line.verb("names", "completion", _completion, 'complete words: eval "$(hificl completion bash)"')
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def _of_methods(_: argparse.Namespace) -> Rows:
    """Return every method, with its options and their defaults."""
    from pipeline import methods

    rows = [
        {
            "name": name, "trained": methods.is_trained(name), "what": methods.summary(name),
            "options": methods.parse(name, {}).plain(),
        }
        for name in methods.names()
    ]  # fmt: skip
    return Rows(rows, {"name": "method", "trained": "trained", "what": "what it does", "options": "options"})


def _of_backbones(_: argparse.Namespace) -> Rows:
    """Return every backbone with its class and checkpoint, then the classes of which any checkpoint can be named."""
    from pipeline import backbones
    from pipeline.backbones.families.generic import architectures

    members = map(backbones.get, backbones.names())
    rows = [
        {
            "name": member.name, "class": member.family.model_name, "parameters": member.parameters,
            "checkpoint": member.hub_id, "stands_for": member.stands_for, "reads": "images", "status": "tested",
            "why": "here by name, with prompts of its own",
        }
        for member in members
    ]  # fmt: skip
    rows += [
        {
            "name": None, "class": row.model_class, "parameters": None, "checkpoint": None, "stands_for": None,
            "reads": row.reads, "status": row.status, "why": row.why, "model_type": row.model_type,
        }
        for row in architectures().values()
    ]  # fmt: skip
    heads = {"name": "backbone", "class": "class", "status": "status", "why": "why"}
    return Rows(rows, heads)


def _of_tasks(_: argparse.Namespace) -> Rows:
    """Return every task, with what it is scored by; those over files that settings here describe too."""
    from pipeline.config.load import PARAMS, load
    from pipeline.tasks import tasks

    if Path(PARAMS).is_file():
        load()
    members = map(tasks.get, tasks.names())
    rows = [
        {
            "name": member.name, "metric": member.metric, "unit": member.unit, "question": member.template.asks,
            "stands_for": member.stands_for if member.stands_for != member.name else None,
        }
        for member in members
    ]  # fmt: skip
    heads = {"name": "task", "metric": "metric", "unit": "unit", "question": "question", "stands_for": "stands for"}
    return Rows(rows, heads)


def _completion(args: argparse.Namespace) -> None:
    """Print the shell's code."""
    import argcomplete

    print(argcomplete.shellcode(["hificl"], shell=args.shell))
