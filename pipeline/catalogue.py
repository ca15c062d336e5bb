"""What can be named in params.yaml and on the command line: methods, backbones, tasks."""

from __future__ import annotations

from pipeline.terminal import Rows


def of_methods() -> Rows:
    """Return every method, with its options and their defaults."""
    from pipeline import methods

    rows = [
        {
            "name": name, "trained": methods.is_trained(name), "what": methods.summary(name),
            "options": methods.validate_options(name, {}),
        }
        for name in methods.names()
    ]  # fmt: skip
    return Rows(rows, {"name": "method", "trained": "trained", "what": "what it does", "options": "options"})


def of_backbones() -> Rows:
    """Return every backbone, with its class in transformers and its checkpoint."""
    from pipeline import backbones

    every = map(backbones.get, backbones.names())
    rows = [
        {
            "name": one.name, "class": one.family.model_name, "parameters": one.parameters, "checkpoint": one.hub_id,
            "stands_for": one.stands_for,
        }
        for one in every
    ]  # fmt: skip
    heads = {"name": "backbone", "class": "class", "parameters": "parameters", "stands_for": "stands for"}
    return Rows(rows, heads)


def of_tasks() -> Rows:
    """Return every task, with what it is scored by."""
    from pipeline.tasks import tasks

    every = map(tasks.get, tasks.names())
    rows = [
        {
            "name": one.name, "metric": one.metric, "unit": one.unit, "question": one.template.asks,
            "stands_for": one.stands_for if one.stands_for != one.name else None,
        }
        for one in every
    ]  # fmt: skip
    heads = {"name": "task", "metric": "metric", "unit": "unit", "question": "question", "stands_for": "stands for"}
    return Rows(rows, heads)


LISTS = {"methods": of_methods, "backbones": of_backbones, "tasks": of_tasks}
