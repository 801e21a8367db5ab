"""Where the rows of a task come from. Light, so that the command's help is quick: no data library is loaded here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .glue import GLUE
from .task import IMAGES, LANGUAGE, TEXT


@dataclass
class DataArguments:
    """Where the rows of a task come from, and which of them are used."""

    folder: str | None = None
    """GLUE: folder with the official files (glue/RTE/train.tsv, ...); oasst1: with .jsonl files of conversation trees;
    default of both: $SPARSEGRAD_DATA, else the hub. images: with train/CLASS/*.png and validation/CLASS/*.png"""
    train_file: str | None = None
    "tasks files and text: CSV, TSV, JSON or JSON lines to train on"
    validation_file: str | None = None
    "tasks files and text: rows to evaluate on, with the same columns"
    text: list[str] = field(default_factory=list)
    """task files: one or two text columns; task text: one column to learn whole, or two, a prompt and the answer, of
    which the answer is learnt"""
    label: str = "label"
    "task files: the label's column"
    labels: list[str] | None = None
    "task files: class names in the order of their numbers; default: those that occur, sorted"
    regression: bool = False
    "task files: the label is a number to predict"
    metrics: list[str] | None = None
    "the first decides which evaluation is the best; default: the task's official ones"
    train_rows: int | None = None
    "train on a random sample of so many rows, the same in each run; default: all"
    validation_rows: int | None = None
    "evaluate on so many rows; default: all"
    max_length: int = 128
    "tokens of a row; longer ones are cut off"
    language: str | None = None
    "oasst1: leave out what is in other languages than this one, such as en; default: take all"
    template: Literal["plain"] | None = None
    """oasst1, text: plain writes Human: and Assistant: turns (or prompt and answer as they are) even where the model
    has a chat template; default: its template, where it has one"""


TASKS = {
    "acceptability": TEXT,
    "files": TEXT,
    **{f"glue/{name}": TEXT for name in GLUE},
    "oasst1": LANGUAGE,
    "text": LANGUAGE,
    "digits": IMAGES,
    "images": IMAGES,
}
"""Name -> kind."""

_WITH_FILES = ("files", "text")


def kind_of(task: str) -> str:
    """A task's kind; that of text for a name that is not known, which `task_problems` reports."""
    return TASKS.get(task, TEXT)


def check_task(name: str, data: DataArguments) -> None:
    """Raise before any long work where a task cannot be loaded as named.

    Raises:
        ValueError: the first of `task_problems`.
    """
    for problem in task_problems(name, data):
        raise ValueError(problem)


def task_problems(name: str, data: DataArguments) -> list[str]:
    """No such task, not all that a task with files needs, settings for another task, counts below 1."""
    problems = []
    if name not in TASKS:
        problems.append(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    if name in _WITH_FILES and (data.validation_file is None or not data.text):
        problems.append(
            f"task {name}: expected data.train_file, data.validation_file and data.text (the text columns), found "
            f"{data.train_file}, {data.validation_file} and {data.text}"
        )
    if name not in _WITH_FILES and (data.train_file or data.validation_file):
        problems.append(f"data.train_file and data.validation_file are for task files or text, found task {name!r}")
    if name == "images" and data.folder is None:
        problems.append("task images: expected data.folder, with train/CLASS/* and validation/CLASS/*; found None")
    if name not in _WITH_FILES and data.text:
        problems.append(f"data.text is for tasks files and text, found task {name!r}")
    if name != "files" and (data.label != "label" or data.labels is not None or data.regression):
        problems.append(f"data.label, data.labels and data.regression are for task files, found task {name!r}")
    if data.language is not None and name != "oasst1":
        problems.append(f"data.language is for task oasst1, found task {name!r}")
    if data.template is not None and kind_of(name) != LANGUAGE:
        problems.append(f"data.template is for tasks oasst1 and text, found task {name!r}")
    for field_name in ("train_rows", "validation_rows", "max_length"):
        value = getattr(data, field_name)
        if value is not None and value < 1:
            problems.append(f"data.{field_name} must be at least 1, found {value}")
    return problems
