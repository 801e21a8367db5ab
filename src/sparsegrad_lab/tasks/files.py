"""A task in your own files: CSV, TSV, JSON or JSON lines, with named columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .metrics import LOSSES
from .read import Row, read_rows
from .task import LANGUAGE, Task, check_columns, make_split


def load_files(
    train: str | Path | None,
    validation: str | Path,
    *,
    text: Sequence[str],
    label: str = "label",
    labels: Sequence[str] | None = None,
    regression: bool = False,
    metrics: Sequence[str] = (),
) -> Task:
    """A task from files with the same columns.

    Args:
        train: rows to train on; None where there is only something to evaluate.
        validation: rows to evaluate on.
        text: one or two text columns.
        label: the label's column.
        labels: the class names, in the order of their numbers; None: those that occur in `train`, sorted (as numbers
            where all of them are).
        regression: the label is a number to predict.
        metrics: names of metrics; default: accuracy, or Pearson and Spearman for regression.

    Raises:
        ValueError: not one or two text columns, a missing column, a label outside the set, a single class, or what
            `read_rows` refuses.
    """
    rows = _rows(train, validation, text, label)
    if regression:
        names = None
    else:
        names = list(labels) if labels else _classes(rows.get("train", rows["validation"]), label)
        if len(names) < 2:
            raise ValueError(
                f"{train or validation}: expected at least two different labels in {label!r}, found "
                f"{', '.join(names) or 'none'}; for a number to predict set regression"
            )
    paths = {"train": train, "validation": validation}
    splits = {name: make_split(found, text, label, names, str(paths[name])) for name, found in rows.items()}
    if not metrics:
        metrics = ("pearson", "spearmanr") if regression else ("accuracy",)
    return Task(
        Path(train or validation).stem, tuple(text), None if names is None else tuple(names), tuple(metrics), splits,
        _source(train, validation),
    )  # fmt: skip


def load_texts(train: str | Path | None, validation: str | Path, *, text: Sequence[str]) -> Task:
    """Texts to go on with, from files with the same columns.

    Args:
        train: rows to train on; None where there is only something to evaluate.
        validation: rows to evaluate on.
        text: one column, which is learnt whole; or two, a prompt and its answer, which is learnt.

    Raises:
        ValueError: not one or two text columns, a missing column, or what `read_rows` refuses.
    """
    from datasets import Dataset

    rows = _rows(train, validation, text)
    splits = {name: Dataset.from_list([{c: row[c] for c in text} for row in found]) for name, found in rows.items()}
    name, source = Path(train or validation).stem, _source(train, validation)
    return Task(name, tuple(text), None, LOSSES, splits, source, LANGUAGE)


def _rows(train: str | Path | None, validation: str | Path, text: Sequence[str], *others: str) -> dict[str, list[Row]]:
    if not 1 <= len(text) <= 2:
        raise ValueError(f"expected one or two text columns, found {len(text)}: {', '.join(text)}")
    paths = {"train": train, "validation": validation}
    rows = {name: read_rows(Path(path)) for name, path in paths.items() if path}
    for name, found in rows.items():
        check_columns(found, (*text, *others), str(paths[name]))
    return rows


def _source(*paths: str | Path | None) -> str:
    return ", ".join(str(path) for path in paths if path)


def _classes(rows: list[Row], label: str) -> list[str]:
    found = {row[label] for row in rows}
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)
