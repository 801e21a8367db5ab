"""Tasks `files` and `text`: rows of your own CSV, TSV, JSON or JSON lines files, with named columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .conversations import CONVERSATION_COLUMNS, completed_prompt, training_conversation
from .hold_out import hold_out
from .labels import class_names, label_values, labelled_dataset
from .read import Row, check_columns, read_rows
from .task import LANGUAGE, LOSSES, Task

logger = logging.getLogger(__name__)


def load_files(
    train_file: str | Path | None,
    validation_file: str | Path | None,
    text: Sequence[str],
    label: str = "label",
    labels: Sequence[str] | None = None,
    regression: bool = False,
    quoting: str | None = None,
    val_size: float | None = None,
) -> Task:
    """Load texts with labels.

    Args:
        train_file: training rows; None if there is nothing to train on.
        validation_file: evaluation rows, with the same columns; None: see `val_size`.
        text: one or two text columns.
        label: the label column.
        labels: class names in the order of their numbers; None: the sorted labels of the training rows.
        regression: labels are values to predict.
        quoting: see `read_rows`.
        val_size: without a validation file, the share of the training rows that is evaluated instead, see `hold_out`.

    Raises:
        ValueError: a column is missing, a label is unknown, there is a single class; and see `read_rows`.
    """
    _check_columns_and_files(train_file, validation_file, text, val_size)
    rows, names = read_labelled(train_file, validation_file, text, label, labels, regression, quoting)
    paths = _paths(train_file, validation_file)
    if val_size is not None:
        of_rows = None if names is None else [row[label].strip() for row in rows["train"]]
        rows["train"], rows["validation"] = hold_out(rows["train"], val_size, of_rows, paths["train"])
    _warn_of_seen_rows(rows, text, paths)
    splits = {split: labelled_dataset(found, text, label, names, paths[split]) for split, found in rows.items()}
    metrics = ("pearson", "spearmanr") if regression else ("accuracy",)
    classes = None if names is None else tuple(names)
    name, source = Path(train_file or validation_file or "").stem, _source(train_file, validation_file)
    return Task(name, tuple(text), classes, metrics, splits, source)


def read_labelled(
    train_file: str | Path | None,
    validation_file: str | Path | None,
    text: Sequence[str],
    label: str,
    labels: Sequence[str] | None,
    regression: bool,
    quoting: str | None,
) -> tuple[dict[str, list[Row]], list[str] | None]:
    """Read texts with labels, and check them without a data library. Arguments and errors: see `load_files`.

    Returns:
        The rows by split, and the names of the classes; None for regression.
    """
    rows, paths = _read(train_file, validation_file, quoting), _paths(train_file, validation_file)
    for split, found in rows.items():
        check_columns(found, (*text, label), paths[split])
    names = None
    if not regression:
        split = "train" if train_file else "validation"
        names = list(labels) if labels else class_names(rows[split], label, paths[split])
        if len(names) < 2:
            raise ValueError(
                f"{paths[split]}: expected at least two different labels in {label!r}, found {', '.join(names)}; to "
                "predict a number set data.regression"
            )
    for split, found in rows.items():
        label_values(found, label, names, paths[split])
    return rows, names


def load_texts(
    train_file: str | Path | None, validation_file: str | Path | None, text: Sequence[str], quoting: str | None = None,
    val_size: float | None = None,
) -> Task:  # fmt: skip
    """Load texts, prompts with answers, or conversations for a language model.

    Args:
        train_file: training rows; None if there is nothing to train on.
        validation_file: evaluation rows, with the same columns.
        text: one column, of texts or of conversations (see `CONVERSATION_COLUMNS`); or two, prompt and answer. These
            hold texts or messages.
        quoting: see `read_rows`.
        val_size: see `load_files`.

    Raises:
        ValueError: a column is missing, a conversation is malformed; and see `read_rows`.
    """
    from datasets import Dataset

    _check_columns_and_files(train_file, validation_file, text, val_size)
    found, paths = _read(train_file, validation_file, quoting), _paths(train_file, validation_file)
    if val_size is not None:
        found["train"], found["validation"] = hold_out(found["train"], val_size, None, str(train_file))
    splits = {
        split: Dataset.from_list(_language_rows(rows, tuple(text), paths[split])) for split, rows in found.items()
    }
    _warn_of_seen_rows(found, text, paths)
    name, source = Path(train_file or validation_file or "").stem, _source(train_file, validation_file)
    return Task(name, tuple(text), None, LOSSES, splits, source, LANGUAGE)


def _language_rows(rows: list[Row], text: tuple[str, ...], where: str) -> list[dict[str, Any]]:
    """Return the rows with their texts, or with a conversation in the first column."""
    if text[0] in CONVERSATION_COLUMNS and len(text) == 1:
        return [
            {text[0]: training_conversation(row.get(text[0]), f"{where}, line {row.line}, {text[0]}")} for row in rows
        ]
    if len(text) == 2 and any(isinstance(row.get(column), list) for row in rows for column in text):
        return [
            {text[0]: completed_prompt(row.get(text[0]), row.get(text[1]), f"{where}, line {row.line}")} for row in rows
        ]
    check_columns(rows, text, where)
    return [{column: row[column] for column in text} for row in rows]


def _check_columns_and_files(
    train: str | Path | None, validation: str | Path | None, text: Sequence[str], val_size: float | None
) -> None:
    if (validation is None) == (val_size is None) or (validation is None and train is None):
        raise ValueError(
            "expected either data.validation_file, or data.train_file with data.val_size; found neither or both"
        )
    if not 1 <= len(text) <= 2:
        raise ValueError(f"data.text: expected one or two text columns, found {len(text)}: {', '.join(text)}")


def _read(train: str | Path | None, validation: str | Path | None, quoting: str | None) -> dict[str, list[Row]]:
    paths = {"train": train, "validation": validation}
    return {split: read_rows(Path(path), quoting=quoting) for split, path in paths.items() if path}


def _paths(train: str | Path | None, validation: str | Path | None) -> dict[str, str]:
    """The file of each split, for messages."""
    return {"train": str(train), "validation": str(validation or train)}


def _warn_of_seen_rows(rows: Mapping[str, list[Row]], text: Sequence[str], paths: Mapping[str, str]) -> None:
    """Log how many evaluation rows have the texts of a training row: the model knows their answers."""
    texts = {split: [repr([row.get(column) for column in text]) for row in found] for split, found in rows.items()}
    trained = set(texts.get("train", ()))
    seen = sum(found in trained for found in texts["validation"])
    if seen:
        logger.warning(
            "%s: %d of %d evaluation rows are also training rows in %s; their score says little about new rows",
            paths["validation"], seen, len(texts["validation"]), paths["train"],
        )  # fmt: skip


def _source(*paths: str | Path | None) -> str:
    return ", ".join(str(path) for path in paths if path)
