"""Read label columns: class names, class numbers, values to predict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from .read import Row, check_columns

if TYPE_CHECKING:
    from datasets import Dataset

_MISSING = ("", "nan", "NaN", "NAN", "None", "null", "NULL", "<NA>")  # spellings of missing values
_SHOWN_CLASSES = 10  # in a message
_UNLABELLED = -1.0  # marks rows without a label in many data sets, GLUE's test files among them


_CLASS_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*)?")
"""A class that is a number. Python reads 1_0, 01 and 1e1 as numbers too, and floats round long ones; here they are
names."""


def class_names(rows: Sequence[Row], label: str, where: str) -> list[str]:
    """Return the classes in a label column, sorted, as numbers if all of them are numbers.

    Spaces around a label are ignored, and "1" and "1.0" are one class; "01" is another.

    Args:
        rows: the rows.
        label: the label column.
        where: the file, for messages.

    Raises:
        ValueError: a label is missing, or is -1, which usually marks rows without a label.
    """
    lines: dict[str, int] = {}
    for row in rows:
        lines.setdefault(row[label].strip(), row.line)
    values = {name: _class_number(name) for name in lines}
    for name, line in lines.items():
        if name in _MISSING or values[name] == _UNLABELLED:
            raise ValueError(
                f"{where}, line {line}: expected a class as {label!r}, found {name!r}, which usually marks a row "
                "without a label. Remove such rows; if it is a class, list all classes in data.labels"
            )
        if len(name) > 1 and name[0] == name[-1] == '"':
            raise ValueError(
                f"{where}, line {line}: expected a class as {label!r}, found {name}, with its quotation marks; remove "
                "the space before them, or list all classes in data.labels"
            )
    if None in values.values():
        return sorted(lines)
    names: dict[Any, str] = {}
    for name in sorted(lines, key=len):
        names.setdefault(values[name], name)
    return [names[value] for value in sorted(names)]


def repeated_class(labels: Iterable[str]) -> str | None:
    """Return the first label that names the same class as an earlier one, such as "1.0" after "1"; else None."""
    seen: set[Any] = set()
    for label in labels:
        value = _class_number(label)
        key = label.strip() if value is None else value
        if key in seen:
            return label
        seen.add(key)
    return None


def labelled_dataset(
    rows: Sequence[Row], text: Sequence[str], label: str, labels: Sequence[str] | None, where: str
) -> Dataset:
    """Return a data set with the text columns and "label".

    Args:
        rows: the rows.
        text: names of the text columns.
        label: name of the label column.
        labels: class names in the order of their numbers; None: labels are values to predict.
        where: the file, for messages.

    Raises:
        ValueError: there are no rows, a column is missing, or a label is unknown; the message names file and line.
    """
    if not rows:
        raise ValueError(f"{where}: expected rows, found none")
    check_columns(rows, (*text, label), where)
    values = label_values(rows, label, labels, where)
    from datasets import Dataset

    columns: dict[str, list[Any]] = {column: [row[column] for row in rows] for column in text}
    return Dataset.from_dict({**columns, "label": values})


def label_values(rows: Iterable[Row], label: str, labels: Sequence[str] | None, where: str) -> list[float | int]:
    """Return the class number of each row, or the value to predict. Arguments and errors: see `labelled_dataset`."""
    by_name = {name.strip(): number for number, name in enumerate(labels or ())}
    by_value = {_class_number(name): number for name, number in by_name.items()}

    def read(row: Row) -> float | int:
        word = row[label].strip()
        found: float | int | None
        if labels is None:
            found = _number(word)
        else:
            value = _class_number(word)
            found = by_name.get(word, None if value is None else by_value.get(value))
        if found is None:
            expected = "a number" if labels is None else f"one of {listed(labels)}"
            raise ValueError(f"{where}, line {row.line}: expected {expected} as {label!r}, found {row[label]!r}")
        return found

    return [read(row) for row in rows]


def listed(labels: Sequence[str]) -> str:
    """Name the classes, or the first of many, for a message."""
    more = f", ... ({len(labels)} classes)" if len(labels) > _SHOWN_CLASSES else ""
    return f"{', '.join(map(repr, labels[:_SHOWN_CLASSES]))}{more}"


def _class_number(word: str) -> Decimal | None:
    """Return the number that a class is, exactly, or None."""
    return Decimal(word) if _CLASS_NUMBER.fullmatch(word.strip()) else None


def _number(word: str) -> float | None:
    """Return the finite number that a word stands for, or None."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
