"""Rows that are held out for evaluation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sparsegrad_lab.tasks.files import load_files, load_texts
from sparsegrad_lab.tasks.hold_out import hold_out


def test_the_same_share_of_each_class_and_the_same_rows_again() -> None:
    classes = ["a"] * 70 + ["b"] * 20 + ["c"] * 9 + ["rare"]
    rows = list(enumerate(classes))
    train, held = hold_out(rows, 0.1, classes, "rows.csv")
    assert Counter(name for _, name in held) == {"a": 7, "b": 2, "c": 1}
    assert sorted(train + held) == rows
    assert (train, held) == (sorted(train), sorted(held))
    assert hold_out(rows, 0.1, classes, "rows.csv") == (train, held)


@pytest.mark.parametrize(("share", "what"), [(0.1, "evaluate"), (0.9, "train")])
def test_no_rows_left(share: float, what: str) -> None:
    with pytest.raises(
        ValueError, match=f"a share of {share} of the 4 rows in 2 classes in x.csv leaves no rows to {what}"
    ):
        hold_out("abcd", share, "aabb", "x.csv")


def test_of_a_file(rows: Path) -> None:
    """Labels are those of the whole file; a language model's rows have none."""
    task = load_files(rows / "train.csv", None, ["text"], val_size=0.25)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 36, "validation": 12}
    assert sorted(task.splits["validation"]["label"]) == [0] * 6 + [1] * 6
    texts = load_texts(rows / "train.csv", None, ["text"], val_size=0.25)
    assert {name: len(split) for name, split in texts.splits.items()} == {"train": 36, "validation": 12}
    everything = {*task.splits["train"]["text"], *task.splits["validation"]["text"]}
    assert everything == set(load_files(None, rows / "train.csv", ["text"]).splits["validation"]["text"])
    with pytest.raises(
        ValueError, match=r"expected either data.validation_file, or data.train_file with data.val_size"
    ):
        load_files(rows / "train.csv", None, ["text"])
