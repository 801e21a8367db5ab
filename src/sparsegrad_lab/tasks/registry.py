"""The tasks by name. Importing this module is cheap: a task's loader is imported when the task is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from . import files, glue, oasst1, quora
from .read import check_first_row
from .task import IMAGES, LANGUAGE, TEXT, Task


def _no_check(data: Any) -> None:
    return


@dataclass(frozen=True)
class TaskSource:
    """How a task is loaded.

    Attributes:
        kind: `TEXT`, `LANGUAGE` or `IMAGES`.
        loader: "module.function" in this package; called with the settings that the task reads.
        reads: names of the settings in `DataArguments` that are passed to the loader.
        options: other arguments of the loader.
        needs: names of the settings that must be set.
        features: names of settings that the kind reads, not the loader.
        check: raises an error for missing files of `DataArguments`, and for missing columns in the first rows;
            of task files also for labels that are no classes, or no numbers.
    """

    kind: str
    loader: str
    reads: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    needs: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    check: Callable[[Any], object] = _no_check

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that the loader or the kind reads, of those that not every task reads."""
        return (*self.reads, *self.features, *(() if self.kind == IMAGES else ("max_length",)))

    def load(self, data: Any) -> Task:
        """Load the task from `DataArguments`."""
        module, _, function = self.loader.partition(".")
        load = getattr(import_module(f".{module}", __package__), function)
        task: Task = load(**dict(self.options), **{name: getattr(data, name) for name in self.reads})
        return task


def _check_rows(data: Any, *, labelled: bool = False) -> None:
    columns = [*(("data.text", column) for column in data.text), *([("data.label", data.label)] if labelled else [])]
    for path in (data.train_file, data.validation_file):
        if path is not None:
            check_first_row(Path(path), columns, data.quoting)
    if labelled:
        files.read_labelled(
            data.train_file, data.validation_file, data.text, data.label, data.labels, data.regression, data.quoting
        )


def _check_folder(find: Callable[[str], object], data: Any) -> None:
    if data.folder is not None:
        find(data.folder)


def _find_images(folder: str) -> None:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"data.folder: there is no folder {folder}")


_ROWS, _NEEDED = ("train_file", "validation_file", "text", "quoting", "val_size"), ("text",)
_GLUE = {
    f"glue/{name}": TaskSource(
        TEXT, "glue.load_glue", ("folder", "val_size"), (("name", name),),
        check=partial(_check_folder, partial(glue.find_folder, name)),
    )
    for name in glue.GLUE
}  # fmt: skip

_LANGUAGE = ("template", "unrelated", "packing")
"Settings that language models read."

TASKS: dict[str, TaskSource] = {
    "acceptability": TaskSource(TEXT, "acceptability.load_acceptability"),
    "files": TaskSource(
        TEXT, "files.load_files", (*_ROWS, "label", "labels", "regression"), needs=_NEEDED,
        check=partial(_check_rows, labelled=True),
    ),
    **_GLUE,
    "quora": TaskSource(
        TEXT, "quora.load_quora", ("folder", "val_size"), check=partial(_check_folder, quora.find_folder)
    ),
    "paraphrases": TaskSource(
        LANGUAGE, "quora.load_paraphrases", ("folder", "val_size"), features=_LANGUAGE,
        check=partial(_check_folder, quora.find_folder),
    ),
    "oasst1": TaskSource(
        LANGUAGE, "oasst1.load_oasst1", ("folder", "language", "val_size"), features=_LANGUAGE,
        check=partial(_check_folder, oasst1.find_folder),
    ),
    "text": TaskSource(
        LANGUAGE, "files.load_texts", _ROWS, needs=_NEEDED, features=_LANGUAGE, check=_check_rows
    ),
    "digits": TaskSource(IMAGES, "images.load_digits"),
    "images": TaskSource(
        IMAGES, "images.load_images", ("folder",), needs=("folder",), check=partial(_check_folder, _find_images)
    ),
}  # fmt: skip
"""Task name -> how it is loaded."""


def kind_of(task: str) -> str:
    """Return the kind of a task; `TEXT` for an unknown name, which `DataArguments.problems` reports."""
    return TASKS[task].kind if task in TASKS else TEXT
