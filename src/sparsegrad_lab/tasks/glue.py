"""Tasks `glue/NAME`: the nine GLUE tasks (Wang et al., 2019), from the official files or the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .hold_out import split_apart
from .labels import labelled_dataset
from .read import read_rows
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = "nyu-mll/glue"
DATA_VARIABLE = "SPARSEGRAD_DATA"
"""Environment variable that names the folder with the data of GLUE and oasst1."""


@dataclass(frozen=True)
class GlueTask:
    """Folder and column names of a task, in the official files and on the hub."""

    folder: str
    "folder in the official archive"
    text: tuple[str, ...]
    "text columns on the hub, and in our data sets"
    columns: tuple[str, ...]
    "text columns in the official files"
    label: str
    "label column in the official files"
    labels: tuple[str, ...] | None
    "class names in the official files, in the hub's order; None: regression"
    metrics: tuple[str, ...]
    header: tuple[str, ...] | None = None
    "column names of official files without a header line"
    validation: tuple[str, ...] = ("validation",)
    ragged: bool = False
    "some rows of the official files lack fields; they are skipped, as elsewhere"


_PAIR, _ENTAILMENT, _BINARY = ("sentence1", "sentence2"), ("entailment", "not_entailment"), ("0", "1")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask("CoLA", ("sentence",), ("sentence",), "label", _BINARY, ("matthews_correlation",),
                     header=("source", "label", "mark", "sentence")),
    "sst2": GlueTask("SST-2", ("sentence",), ("sentence",), "label", _BINARY, ("accuracy",)),
    "mrpc": GlueTask("MRPC", _PAIR, ("#1 String", "#2 String"), "Quality", _BINARY, ("accuracy", "f1")),
    "stsb": GlueTask("STS-B", _PAIR, _PAIR, "score", None, ("pearson", "spearmanr")),
    "qqp": GlueTask("QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate", _BINARY,
                    ("accuracy", "f1"), ragged=True),
    "mnli": GlueTask("MNLI", ("premise", "hypothesis"), _PAIR, "gold_label",
                     ("entailment", "neutral", "contradiction"), ("accuracy",),
                     validation=("validation_matched", "validation_mismatched")),
    "qnli": GlueTask("QNLI", ("question", "sentence"), ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask("RTE", _PAIR, _PAIR, "label", _ENTAILMENT, ("accuracy",)),
    "wnli": GlueTask("WNLI", _PAIR, _PAIR, "label", _BINARY, ("accuracy",)),
}  # fmt: skip

_FILES = {
    "train": "train",
    "validation": "dev",
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
}


def load_glue(name: str, folder: str | Path | None = None, val_size: float | None = None) -> Task:
    """Load a GLUE task, such as "rte".

    Args:
        name: one of `GLUE`.
        folder: see `find_folder`; None: the folder in the environment variable SPARSEGRAD_DATA if it has the task, else
            the hub.
        val_size: train on the official evaluation rows, without this share of them, which is evaluated; the training
            file is not read. MNLI: the matched rows. Rows that share a text stay together.

    Raises:
        ValueError: there is no such task, or see `read_rows` and `split_apart`.
        FileNotFoundError: the folder does not have the task, or the hub cannot be reached.
    """
    if name not in GLUE:
        raise ValueError(f"expected a GLUE task, one of {', '.join(GLUE)}; found {name!r}")
    task = GLUE[name]
    if folder is None:
        folder = os.environ.get(DATA_VARIABLE)
        if not folder or not (Path(folder) / "glue" / task.folder).is_dir():
            return _split(_from_hub(name, task), val_size)
    found = find_folder(name, folder)
    wanted = (task.validation[0],) if val_size is not None else ("train", *task.validation)
    splits = {split: _read(path, task) for split, path in _split_files(found, task).items() if split in wanted}
    return _split(Task(f"glue/{name}", task.text, task.labels, task.metrics, splits, str(found)), val_size)


def _split(task: Task, val_size: float | None) -> Task:
    """Return the task with its first evaluation split cut in two, of which `val_size` is evaluated."""
    if val_size is None:
        return task
    name = task.evaluation_splits[0]
    train, held = split_apart(task.splits[name], val_size, task.text, f"data.val_size, {task.source}")
    return replace(task, splits={"train": train, name: held}, apart=True)


def find_folder(name: str, data: str | Path) -> Path:
    """Return the folder with the files of a GLUE task. Reads no file.

    Args:
        name: one of `GLUE`.
        data: a folder that holds `glue/RTE/{train,dev}.tsv`, `RTE/{train,dev}.tsv`, or the files themselves.

    Raises:
        FileNotFoundError: there are no such files, or none to evaluate on.
    """
    task, root = GLUE[name], Path(data)
    candidates = [root / "glue" / task.folder, root / task.folder, root]
    for folder in candidates:
        splits = _split_files(folder, task)
        if set(splits) > {"train"} or (splits and "train" not in splits):
            return folder
        if splits:
            expected = " or ".join(str(path) for path in _candidates(folder, task.validation[0]))
            raise FileNotFoundError(f"{folder}: expected rows to evaluate on, in {expected}")
    raise FileNotFoundError(
        f"{root}: expected train.tsv and dev.tsv of {task.folder}, in {', '.join(map(str, candidates))}"
    )


def _split_files(folder: Path, task: GlueTask) -> dict[str, Path]:
    """Return the file of each split that is there."""
    found: dict[str, Path] = {}
    for split in ("train", *task.validation):
        for path in _candidates(folder, split):
            if path.is_file():
                found.setdefault(split, path)
    return found


def _candidates(folder: Path, split: str) -> list[Path]:
    return [folder / f"{_FILES[split]}.{ending}" for ending in ("tsv", "jsonl")]


def _read(path: Path, task: GlueTask) -> Dataset:
    rows = read_rows(path, header=task.header, quoting="none", skip_ragged=task.ragged)
    columns, label = task.columns, task.label
    if path.suffix == ".jsonl":  # has the hub's column names
        columns, label = task.text, "label"
    elif label not in rows[0] and "label" in rows[0]:
        label = "label"
    for row in rows:  # official column names -> the hub's
        values = [row.get(column) for column in columns]
        row.update({name: value for name, value in zip(task.text, values, strict=True) if value is not None})
    return labelled_dataset(rows, task.text, label, task.labels, str(path))


def _from_hub(name: str, task: GlueTask) -> Task:
    from datasets import load_dataset

    try:
        found = load_dataset(HUB_NAME, name)
    except Exception as error:  # the network raises many types
        raise FileNotFoundError(
            f"glue/{name} could not be loaded from the hub ({type(error).__name__}: {error}); name a folder with the "
            f"official files, {task.folder}/train.tsv and dev.tsv, in data.folder or in ${DATA_VARIABLE}"
        ) from error
    return from_hub_splits(name, found)


def from_hub_splits(name: str, found: dict[str, Dataset]) -> Task:
    """Return the hub's data sets as a task, without the test splits, which have no labels."""
    task = GLUE[name]
    splits = {split: found[split].select_columns([*task.text, "label"]) for split in ("train", *task.validation)}
    for split, data in splits.items():
        if task.labels is not None and min(data["label"]) < 0:
            raise ValueError(f"{HUB_NAME}, {name}, {split}: expected labels from 0 on, found {min(data['label'])}")
    return Task(f"glue/{name}", task.text, task.labels, task.metrics, splits, f"hub: {HUB_NAME}")
