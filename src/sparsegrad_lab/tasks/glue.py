"""The nine GLUE tasks (Wang et al., 2019), from a folder with the official files or from the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .read import read_rows
from .task import Task, make_split

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = "nyu-mll/glue"
ENVIRONMENT = "SPARSEGRAD_DATA"


@dataclass(frozen=True)
class GlueTask:
    """Where a task is found and what its columns are called: in the official files, and on the hub."""

    folder: str
    "of the official archive"
    text: tuple[str, ...]
    "on the hub, and in our data sets"
    columns: tuple[str, ...]
    "text columns in the official files"
    label: str
    "label column in the official files"
    labels: tuple[str, ...] | None
    "class names as in the official files, in the hub's order of numbers; None: regression"
    metrics: tuple[str, ...]
    header: tuple[str, ...] | None = None
    "for files without one"
    validation: tuple[str, ...] = ("validation",)
    ragged: bool = False
    "the official files have rows with fields missing, which everybody leaves out"


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


def load_glue(name: str, data: str | Path | None = None) -> Task:
    """A GLUE task, such as "rte".

    Args:
        name: one of `GLUE`.
        data: a folder with `glue/RTE/{train,dev}.tsv` in it (or `RTE/`, or the files themselves); None: the folder
            that the environment variable SPARSEGRAD_DATA names, else the hub. Evaluation files that are missing are
            left out, as long as there is one.

    Raises:
        ValueError: there is no such task, or what `read_rows` refuses.
        FileNotFoundError: the folder has no such task, or no file to evaluate on.
    """
    if name not in GLUE:
        raise ValueError(f"expected a GLUE task, one of {', '.join(GLUE)}; found {name!r}")
    task = GLUE[name]
    root = Path(data) if data is not None else _folder_of_environment(task)
    if root is None:
        return _from_hub(name, task)
    folder = _find(root, task)
    splits: dict[str, Dataset] = {}
    for split in ("train", *task.validation):
        path = next((p for p in _candidates(folder, split) if p.is_file()), None)
        if path is not None:
            splits[split] = _read(path, task)
    if set(splits) <= {"train"}:
        expected = " or ".join(str(path) for path in _candidates(folder, task.validation[0]))
        raise FileNotFoundError(f"{folder}: expected rows to evaluate on, in {expected}")
    return Task(f"glue/{name}", task.text, task.labels, task.metrics, splits, str(folder))


def _folder_of_environment(task: GlueTask) -> Path | None:
    root = os.environ.get(ENVIRONMENT)
    return Path(root) if root and (Path(root) / "glue" / task.folder).is_dir() else None


def _find(root: Path, task: GlueTask) -> Path:
    candidates = [root / "glue" / task.folder, root / task.folder, root]
    for folder in candidates:
        if any(path.is_file() for split in _FILES for path in _candidates(folder, split)):
            return folder
    raise FileNotFoundError(
        f"{root}: expected train.tsv and dev.tsv of {task.folder}, in {', '.join(map(str, candidates))}"
    )


def _candidates(folder: Path, split: str) -> list[Path]:
    return [folder / f"{_FILES[split]}.{ending}" for ending in ("tsv", "jsonl")]


def _read(path: Path, task: GlueTask) -> Dataset:
    rows = read_rows(path, header=task.header, quoted=False, skip_ragged=task.ragged)
    columns, label = task.columns, task.label
    if path.suffix == ".jsonl":  # with the hub's column names, and the label in words
        columns, label = task.text, "label"
    elif label not in rows[0] and "label" in rows[0]:
        label = "label"
    for row in rows:  # official names -> the hub's
        values = [row.get(column) for column in columns]
        row.update({name: value for name, value in zip(task.text, values, strict=True) if value is not None})
    return make_split(rows, task.text, label, task.labels, str(path))


def _from_hub(name: str, task: GlueTask) -> Task:
    from datasets import load_dataset

    try:
        found = load_dataset(HUB_NAME, name)
    except Exception as error:  # whatever the network gives
        raise FileNotFoundError(
            f"glue/{name} could not be taken from the hub ({type(error).__name__}: {error}); name a folder with the "
            f"official files, {task.folder}/train.tsv and dev.tsv, in data.folder or in ${ENVIRONMENT}"
        ) from error
    return from_hub_splits(name, found)


def from_hub_splits(name: str, found: dict[str, Dataset]) -> Task:
    """The hub's data sets as a task; its test splits have no labels and are left out."""
    task = GLUE[name]
    splits = {split: found[split].select_columns([*task.text, "label"]) for split in ("train", *task.validation)}
    return Task(f"glue/{name}", task.text, task.labels, task.metrics, splits, f"hub: {HUB_NAME}")
