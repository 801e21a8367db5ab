"""A task in your own files: CSV, TSV, JSON or JSON lines, with named columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .read import Row, read_rows
from .task import Task, check_columns, make_split


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
    if not 1 <= len(text) <= 2:
        raise ValueError(f"expected one or two text columns, found {len(text)}: {', '.join(text)}")
    rows = {name: read_rows(Path(path)) for name, path in (("train", train), ("validation", validation)) if path}
    for name, path in (("train", train), ("validation", validation)):
        check_columns(rows.get(name, []), (*text, label), str(path))
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
    name = Path(train or validation).stem
    source = ", ".join(str(path) for path in (train, validation) if path)
    return Task(name, tuple(text), None if names is None else tuple(names), tuple(metrics), splits, source)


def _classes(rows: list[Row], label: str) -> list[str]:
    found = {row[label] for row in rows}
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)
