"""Load a task by its name."""

from __future__ import annotations

from dataclasses import replace

from .metrics import check_metrics
from .registry import TASKS
from .settings import DataArguments
from .task import Task


def load_task(name: str, data: DataArguments | None = None) -> Task:
    """Load a task with the rows that `data` selects.

    Raises:
        ValueError: a setting is not valid, or a file is malformed.
        FileNotFoundError: a file is missing.
    """
    data = data or DataArguments()
    if problems := data.problems(name, files=False):
        raise ValueError("\n".join(problems))
    task = TASKS[name].load(data)
    if data.metrics:
        task = replace(task, metrics=tuple(data.metrics))
    check_metrics(task.metrics, task.labels, task.kind)
    task = task.limited(data.train_rows, data.validation_rows)
    return task if data.development_share is None else task.with_development_split(data.development_share)
