"""Runs that learnt nothing useful say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsegrad_lab.run.doubts import doubts, label_doubts, mean_loss
from sparsegrad_lab.tasks.files import load_files
from sparsegrad_lab.tasks.metrics import scores_by_class


def log(*losses: float) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]


def of_classes(labels: list[int], predictions: list[int], names: tuple[str, ...] = ("no", "yes")) -> Any:
    return scores_by_class(names, np.array(labels), np.array(predictions))


def test_mean_loss() -> None:
    entries = [*log(*map(float, range(1, 13))), {"step": 12, "eval_loss": 100.0}]
    assert mean_loss(entries, 5 / 6, 1) == 11.5
    assert mean_loss(entries, 0, 1 / 6) == 1.5
    assert mean_loss([], 0, 1) is None


def test_one_class_for_all_rows() -> None:
    (found,) = doubts(of_classes([0, 1, 1], [1, 1, 1]), [])
    assert found.startswith("the model predicts 'yes' for every row; try another learning rate")
    assert not doubts(of_classes([0, 1, 1], [0, 1, 1]), [])
    assert not doubts(of_classes([1, 1], [1, 1]), [])  # there is nothing else to predict
    many = tuple(map(str, range(200)))
    assert not doubts(of_classes([0, 1], [1, 1], many), [])  # its confusion matrix is not kept
    assert not doubts(None, [])


@pytest.mark.parametrize(
    ("losses", "rose"), [((2.0,) * 5 + (2.3,), True), ((2.0,) * 5 + (2.1,), False), ((2.0,), False)]
)
def test_a_loss_that_rose(losses: tuple[float, ...], rose: bool) -> None:
    found = doubts(None, log(*losses))
    assert found == (["the training loss rose from 2.000 to 2.300; lower training.learning_rate"] if rose else [])


@pytest.mark.parametrize(("error", "far"), [(4.5, True), (3.9, False)])
def test_predictions_on_another_scale_than_the_labels(error: float, far: bool) -> None:
    """A correlation is blind to it."""
    found = doubts(None, [{"step": 1, "eval_loss": 9.0}, {"step": 2, "eval_loss": error}], label_variance=4.0)
    assert [words[:46] for words in found] == (["the predictions are further from the labels than"[:46]] if far else [])


def test_labels_without_training_rows_and_labels_that_look_alike(tmp_path: Path) -> None:
    """The labels are given, so that the evaluation file may have others than the training file."""
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    train.write_text("text,label\na,Yes\nb,yes \nc,no\nd,not  sure\ne,not sure\n", encoding="utf-8")
    dev.write_text("text,label\na,maybe\nb,no\n", encoding="utf-8")
    names = ["Yes", "yes", "no", "not sure", "not  sure", "maybe"]
    missing, alike = label_doubts(load_files(train, dev, ["text"], labels=names))
    assert missing.startswith("no training row has the label 'maybe', so the model cannot learn it; add such rows")
    assert alike.startswith("'Yes' and 'yes', 'not sure' and 'not  sure' are different classes, and differ only in cap")
    assert not label_doubts(load_files(train, train, ["text"], label="text"))
    values = tmp_path / "values.csv"
    values.write_text("text,label\na,1\nb,2\n", encoding="utf-8")
    assert not label_doubts(load_files(values, values, ["text"], regression=True))
