"""Label columns: which classes there are, and which values are no classes."""

from __future__ import annotations

import pytest

from sparsegrad_lab.tasks.labels import class_names, labelled_dataset, repeated_class
from sparsegrad_lab.tasks.read import Row


def rows_of(*labels: str) -> list[Row]:
    rows = [Row(text="x", label=label) for label in labels]
    for line, row in enumerate(rows, start=2):
        row.line = line
    return rows


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        (["10", "9", "9"], ["9", "10"], [1, 0, 0]),
        (["1", " 1", "1.0", "0"], ["0", "1"], [1, 1, 1, 0]),
        (["1.0", "0.0"], ["0.0", "1.0"], [1, 0]),
        (["1.5", "0.5"], ["0.5", "1.5"], [1, 0]),
        (["yes", "yes ", "no"], ["no", "yes"], [1, 1, 0]),
        (["2_1", "21"], ["21", "2_1"], [1, 0]),  # Python reads both as 21
        (["01", "1"], ["01", "1"], [0, 1]),
        (["1e1", "10"], ["10", "1e1"], [1, 0]),
        (["12345678901234567", "12345678901234568"], ["12345678901234567", "12345678901234568"], [0, 1]),
    ],
)
def test_classes(labels: list[str], names: list[str], numbers: list[int]) -> None:
    rows = rows_of(*labels)
    assert class_names(rows, "label", "rows.csv") == names
    assert labelled_dataset(rows, ["text"], "label", names, "rows.csv")["label"][:] == numbers


@pytest.mark.parametrize("label", ["-1", "-1.0", "", " ", "nan", "NaN", "None", "null"])
def test_a_row_without_a_label(label: str) -> None:
    words = (
        rf"rows.csv, line 4: expected a class as 'label', found {label.strip()!r}, which usually marks a row without"
    )
    with pytest.raises(ValueError, match=words):
        class_names(rows_of("0", "1", label), "label", "rows.csv")


def test_minus_one_is_a_class_where_it_is_listed() -> None:
    data = labelled_dataset(rows_of("-1", "1", "0"), ["text"], "label", ["-1", "0", "1"], "rows.csv")
    assert data["label"][:] == [0, 2, 1]


def test_other_spelling_in_another_split() -> None:
    """Training rows say "1", evaluation rows "1.0"."""
    assert labelled_dataset(rows_of("1.0", "0.0"), ["text"], "label", ["0", "1"], "dev.csv")["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("label", "labels", "words"),
    [
        ("2", ["0", "1"], r"rows.csv, line 2: expected one of '0', '1' as 'label', found '2'"),
        (
            "x",
            [f"c{n}" for n in range(60)],
            r"expected one of 'c0', 'c1', .*'c9', \.\.\. \(60 classes\) as 'label', found 'x'",
        ),
        ("many", None, r"rows.csv, line 2: expected a number as 'label', found 'many'"),
        ("nan", None, r"rows.csv, line 2: expected a number as 'label', found 'nan'"),
        ("inf", None, r"rows.csv, line 2: expected a number as 'label', found 'inf'"),
        ("", None, r"rows.csv, line 2: expected a number as 'label', found ''"),
    ],
)
def test_labels_that_are_refused(label: str, labels: list[str] | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        labelled_dataset(rows_of(label), ["text"], "label", labels, "rows.csv")


@pytest.mark.parametrize(
    ("labels", "repeated"),
    [(["0", "0", "1"], "0"), (["0", "1", "1.0"], "1.0"), (["a", "b", " a"], " a"), (["a", "A"], None)],
)
def test_repeated_classes(labels: list[str], repeated: str | None) -> None:
    assert repeated_class(labels) == repeated


def test_quotation_marks_are_no_part_of_a_class() -> None:
    """A CSV file with a space before the quotation mark."""
    with pytest.raises(
        ValueError, match=r'line 3: expected a class as .label., found "good", with its quotation marks'
    ):
        class_names(rows_of("good", ' "good"'), "label", "rows.csv")
