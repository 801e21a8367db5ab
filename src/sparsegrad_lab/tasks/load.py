"""A task by its name."""

from __future__ import annotations

from dataclasses import replace

from .acceptability import load_acceptability
from .files import load_files, load_texts
from .glue import load_glue
from .images import load_digits, load_images
from .metrics import check_fit, check_metrics
from .oasst1 import load_oasst1
from .settings import DataArguments, check_task
from .task import Task


def load_task(name: str, data: DataArguments | None = None) -> Task:
    """A task by its name, with the rows that `data` asks for.

    Raises:
        ValueError, FileNotFoundError: see `check_task`, `load_glue`, `load_files`, `load_texts`, `load_oasst1` and
            `load_images`.
    """
    data = data or DataArguments()
    check_task(name, data)
    check_metrics(data.metrics or ())
    if name == "files":
        assert data.validation_file is not None
        task = load_files(
            data.train_file, data.validation_file, text=data.text, label=data.label, labels=data.labels,
            regression=data.regression,
        )  # fmt: skip
    elif name == "text":
        assert data.validation_file is not None
        task = load_texts(data.train_file, data.validation_file, text=data.text)
    elif name == "digits":
        task = load_digits()
    elif name == "images":
        assert data.folder is not None
        task = load_images(data.folder)
    elif name == "oasst1":
        task = load_oasst1(data.folder, data.language)
    elif name == "acceptability":
        task = load_acceptability()
    else:
        task = load_glue(name.removeprefix("glue/"), data.folder)
    if data.metrics:
        task = replace(task, metrics=tuple(data.metrics))
    check_fit(task.metrics, task.labels, task.kind)
    return task.limited(data.train_rows, data.validation_rows)
