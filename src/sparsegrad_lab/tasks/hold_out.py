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


def split_dataset(data: Dataset, share: float, *, stratified: bool, where: str) -> tuple[Dataset, Dataset]:
    """Split a data set as `hold_out` splits rows; `stratified`: the same share of each class in column "label"."""
    classes = data["label"] if stratified else None
    train, held = hold_out(range(len(data)), share, classes, where)
    return data.select(train), data.select(held)
