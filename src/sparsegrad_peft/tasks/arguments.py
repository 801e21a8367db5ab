"""Where the rows of a task come from. Light, so that the command's help is quick: no data library is loaded here."""

from __future__ import annotations

from dataclasses import dataclass, field

from .glue import GLUE


@dataclass
class DataArguments:
    """Where the rows of a task come from, and which of them are used."""

    folder: str | None = None
    "GLUE: folder with the official files (glue/RTE/train.tsv, ...); default: $SPARSEGRAD_DATA, else the hub"
    train_file: str | None = None
    "task files: CSV, TSV, JSON or JSON lines to train on"
    validation_file: str | None = None
    "task files: rows to evaluate on, with the same columns"
    text: list[str] = field(default_factory=list)
    "task files: one or two text columns"
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


TASKS = ("acceptability", "files", *(f"glue/{name}" for name in GLUE))


def check_task(name: str, data: DataArguments) -> None:
    """Raise before any long work where a task cannot be loaded as named.

    Raises:
        ValueError: the first of `task_problems`.
    """
    for problem in task_problems(name, data):
        raise ValueError(problem)


def task_problems(name: str, data: DataArguments) -> list[str]:
    """No such task, not all that "files" needs, files for another task, counts below 1."""
    problems = []
    if name not in TASKS:
        problems.append(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    if name == "files" and (data.validation_file is None or not data.text):
        problems.append(
            "task files: expected data.train_file, data.validation_file and data.text (the text columns), found "
            f"{data.train_file}, {data.validation_file} and {data.text}"
        )
    if name != "files" and (data.train_file or data.validation_file):
        problems.append(f"data.train_file and data.validation_file are for task files, found task {name!r}")
    for field_name in ("train_rows", "validation_rows", "max_length"):
        value = getattr(data, field_name)
        if value is not None and value < 1:
            problems.append(f"data.{field_name} must be at least 1, found {value}")
    return problems
