"""The tasks by name. Importing this module is cheap: a task's loader is imported when the task is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import glue, oasst1
from .read import check_rows_file
from .task import IMAGES, LANGUAGE, TEXT, Task


@dataclass(frozen=True)
class TaskSource:
    """How a task is loaded.

    Attributes:
        kind: `TEXT`, `LANGUAGE` or `IMAGES`.
        load: loads the task from `DataArguments`.
        reads: the settings of `DataArguments` that this task reads besides those that every task reads.
        needs: those that must be set.
        check_files: raises an error for missing files, from `DataArguments`; does not read the files.
    """

    kind: str
    load: Callable[[Any], Task]
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    check_files: Callable[[Any], object] = lambda data: None


def _files(data: Any) -> Task:
    from .files import load_files

    return load_files(
        data.train_file, data.validation_file, text=data.text, label=data.label, labels=data.labels,
        regression=data.regression, quoting=data.quoted,
    )  # fmt: skip


def _text(data: Any) -> Task:
    from .files import load_texts

    return load_texts(data.train_file, data.validation_file, text=data.text, quoting=data.quoted)


def _acceptability(data: Any) -> Task:
    from .acceptability import load_acceptability

    return load_acceptability()


def _digits(data: Any) -> Task:
    from .images import load_digits

    return load_digits()


def _images(data: Any) -> Task:
    from .images import load_images

    return load_images(data.folder)


def _glue(name: str, data: Any) -> Task:
    return glue.load_glue(name, data.folder)


def _oasst1(data: Any) -> Task:
    return oasst1.load_oasst1(data.folder, data.language)


def _check_rows(data: Any) -> None:
    for path in (data.train_file, data.validation_file):
        if path is not None:
            check_rows_file(Path(path))


def _check_glue(name: str, data: Any) -> None:
    if data.folder is not None:
        glue.find_folder(name, data.folder)


def _check_oasst1(data: Any) -> None:
    if data.folder is not None:
        oasst1.find_folder(data.folder)


def _check_folder(data: Any) -> None:
    if data.folder is not None and not Path(data.folder).is_dir():
        raise FileNotFoundError(f"data.folder: there is no folder {data.folder}")


_ROWS = ("train_file", "validation_file", "text", "quoting")
_NEEDED_ROWS = ("validation_file", "text")

TASKS: dict[str, TaskSource] = {
    "acceptability": TaskSource(TEXT, _acceptability),
    "files": TaskSource(TEXT, _files, (*_ROWS, "label", "labels", "regression"), _NEEDED_ROWS, _check_rows),
    **{
        f"glue/{name}": TaskSource(TEXT, partial(_glue, name), ("folder",), (), partial(_check_glue, name))
        for name in glue.GLUE
    },
    "oasst1": TaskSource(LANGUAGE, _oasst1, ("folder", "language", "template"), (), _check_oasst1),
    "text": TaskSource(LANGUAGE, _text, (*_ROWS, "template"), _NEEDED_ROWS, _check_rows),
    "digits": TaskSource(IMAGES, _digits),
    "images": TaskSource(IMAGES, _images, ("folder",), ("folder",), _check_folder),
}
"""Task name -> how it is loaded."""


def kind_of(task: str) -> str:
    """Return the kind of a task; `TEXT` for an unknown name, which `DataArguments.problems` reports."""
    return TASKS[task].kind if task in TASKS else TEXT
