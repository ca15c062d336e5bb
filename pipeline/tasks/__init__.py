"""Tasks: one file a task, from official files to samples, prompt and score."""

from __future__ import annotations

from pipeline.core.registry import Registry
from pipeline.tasks.base import PromptTemplate, Score, Task

tasks: Registry[Task] = Registry("task", "pipeline.tasks", "hificl.tasks")
get = tasks.get
names = tasks.names

__all__ = ["PromptTemplate", "Score", "Task", "get", "names", "tasks"]
