"""Hold out a part of a file's rows for evaluation."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset

_Row = TypeVar("_Row")


def hold_out(
    rows: Sequence[_Row], share: float, classes: Sequence[Hashable] | None, where: str
) -> tuple[list[_Row], list[_Row]]:
    """Split rows at random, the same way in each run.

    Args:
        rows: the rows.
        share: of each class that is held out, rounded to whole rows.
        classes: class of each row; None: all rows are alike.
        where: the file, for messages.

    Returns:
        Training rows and held-out rows, both in the order of the file.

    Raises:
        ValueError: one of both would be empty.
    """
    members: dict[Hashable, list[int]] = {}
    for place, name in enumerate(classes or [None] * len(rows)):
        members.setdefault(name, []).append(place)
    generator = random.Random(0)
    held = {place for places in members.values() for place in generator.sample(places, round(share * len(places)))}
    if not 0 < len(held) < len(rows):
        of_classes = f" in {len(members)} classes" if len(members) > 1 else ""
        raise ValueError(
            f"data.val_size: a share of {share:g} of the {len(rows)} rows{of_classes} in {where} leaves no rows to "
            f"{'train' if held else 'evaluate'} on; change the share, or give data.validation_file"
        )
    return (
        [row for place, row in enumerate(rows) if place not in held],
        [row for place, row in enumerate(rows) if place in held],
    )


def split_apart(data: Dataset, share: float, text: Sequence[str], where: str) -> tuple[Dataset, Dataset]:
    """Split a data set at random, the same way in each run. Rows that share a text stay together.

    Three rows of MNLI have the same premise, for example. A model that trains on one of them knows something about the
    others.

    Args:
        data: the rows.
        share: of the groups of rows that is held out, about this share of the rows.
        text: columns of texts.
        where: the setting and the file, for messages.

    Returns:
        Training rows and held-out rows.

    Raises:
        ValueError: one of both would be empty.
    """
    from sklearn.model_selection import GroupShuffleSplit

    groups = _groups([data[column] for column in text])
    count = len(set(groups))
    if not 0 < round(share * count) < count:
        raise ValueError(
            f"{where}: {len(data)} rows form {count} groups that share texts, and a share of {share:g} leaves one of "
            "both parts empty; change the share"
        )
    split = GroupShuffleSplit(n_splits=1, test_size=round(share * count), random_state=0)
    train, held = next(split.split(groups, groups=groups))
    return data.select(train), data.select(held)


def _groups(columns: Sequence[Sequence[str]]) -> list[int]:
    """The group of each row. Two rows are in one group if they share a text, or if each shares one with a third."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}
    rows = len(columns[0])
    links = [(row, numbers.setdefault(text, len(numbers))) for column in columns for row, text in enumerate(column)]
    first = [row for row, _ in links]
    second = [rows + number for _, number in links]
    nodes = rows + len(numbers)
    graph = coo_matrix(([1] * len(links), (first, second)), shape=(nodes, nodes))
    return [int(group) for group in connected_components(graph, directed=False)[1][:rows]]
