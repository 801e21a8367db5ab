"""A task: its splits, which columns are text, what the labels mean, and how it is scored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .read import Row

if TYPE_CHECKING:
    from datasets import Dataset

TEXT, LANGUAGE, IMAGES = "text classification", "causal language modelling", "image classification"
"""Kinds of task. A number to predict from text is of the first kind as well."""


@dataclass(frozen=True)
class Task:
    """Sentences, or pairs of sentences, with a class or a number each; texts to go on with; or images with a class.

    Attributes:
        name: such as "glue/rte".
        text: one or two columns.
        labels: class names, in the order of their numbers; None: the label is a number (regression), or there is none.
        metrics: names in `metrics.METRICS`; the first decides which evaluation is the best, unless there are several:
            then it is their mean, "combined_score", or the first of several losses.
        splits: "train" and evaluation splits ("validation", ...), with the columns of `text` and "label".
        source: where the rows came from, for the record.
        kind: `TEXT`, `LANGUAGE` (no column "label"; the text may be a list, the turns of a
            conversation) or `IMAGES` (the text is a column of images, see `images`).
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    splits: Mapping[str, Dataset] = field(repr=False)
    source: str = ""
    kind: str = TEXT

    @property
    def evaluation_splits(self) -> list[str]:
        """All splits but the one to train on."""
        return [name for name in self.splits if name != "train"]

    @property
    def main_metric(self) -> str:
        """The one that decides which evaluation is the best."""
        from .metrics import main_metric  # scikit-learn and SciPy: not for --help

        return main_metric(self.metrics)

    def limited(self, train: int | None, validation: int | None) -> Task:
        """The first rows only, after a shuffle with a fixed seed: a sample that is the same in each run."""
        limits = {name: train if name == "train" else validation for name in self.splits}
        splits = {}
        for name, data in self.splits.items():
            limit = limits[name]
            whole = limit is None or limit >= len(data)
            splits[name] = data if whole else data.shuffle(seed=0).select(range(limit))  # type: ignore[arg-type]
        return replace(self, splits=splits)


def make_split(
    rows: Sequence[Row], text: Sequence[str], label: str, labels: Sequence[str] | None, where: str
) -> Dataset:
    """Checked rows -> a data set with the text columns and "label".

    Args:
        rows: column -> string.
        text: names of the text columns.
        label: name of the label's column.
        labels: class names; None for a number.
        where: the file, for messages.

    Raises:
        ValueError: no rows, a missing column, a label outside the set; the message names file and line.
    """
    if not rows:
        raise ValueError(f"{where}: expected rows, found none")
    check_columns(rows, (*text, label), where)
    from datasets import Dataset

    number_in = {name: number for number, name in enumerate(labels or ())}

    def number(row: Row) -> Any:
        try:
            found = float(row[label]) if labels is None else number_in[row[label]]
            if not math.isfinite(found):
                raise ValueError(label)
        except (KeyError, ValueError):
            expected = "a number" if labels is None else f"one of {', '.join(map(repr, labels))}"
            raise ValueError(
                f"{where}, line {row.line}: expected {expected} as {label!r}, found {row[label]!r}"
            ) from None
        return found

    columns: dict[str, list[Any]] = {column: [row[column] for row in rows] for column in text}
    return Dataset.from_dict({**columns, "label": [number(row) for row in rows]})


def check_columns(rows: Iterable[Row], columns: Sequence[str], where: str) -> None:
    """Raise ValueError for the first row that lacks a column: an object of a JSON file may."""
    for row in rows:
        for column in columns:
            if column not in row:
                raise ValueError(
                    f"{where}, line {row.line}: expected a column {column!r}, found {', '.join(map(repr, row))}"
                )
