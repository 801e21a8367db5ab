"""Signs that a run's model learns nothing useful: in its labels before it, and in its scores after it."""

from __future__ import annotations

from typing import Any

from ..tasks.labels import listed
from ..tasks.task import Task

_RISE = 1.1
"Factor by which the training loss has to rise before a run is reported; batches differ by less."


def label_doubts(task: Task) -> list[str]:
    """Return a sentence for classes that no training row has, and one for classes that may be one class."""
    names, found = task.labels or (), []
    if names:
        trained = set(task.splits["train"]["label"])
        missing = [name for number, name in enumerate(names) if number not in trained]
        if missing:
            found.append(
                f"no training row has the label {listed(missing)}, so the model cannot learn it; add such rows, or "
                "remove the class"
            )
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    if groups := [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]:
        found.append(
            f"{', '.join(groups)} are different classes, and differ only in capitals or spaces; if they mean the same, "
            "write them alike in all files"
        )
    return found


def doubts(
    by_class: dict[str, Any] | None, log: list[dict[str, Any]], label_variance: float | None = None
) -> list[str]:
    """Return a sentence for each sign, with what to try.

    Args:
        by_class: `scores_by_class` of the scored rows; None for a task without classes.
        log: the Trainer's log, with "step", "loss" and "eval_loss".
        label_variance: of the evaluated rows, for regression.
    """
    found = []
    if by_class is not None and (name := _single_prediction(by_class)) is not None:
        found.append(
            f"the model predicts {name!r} for every row; try another learning rate, more epochs, or more rows of the "
            "other classes"
        )
    errors = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    if label_variance is not None and errors and min(errors) > label_variance:
        found.append(
            "the predictions are further from the labels than the labels' mean is (mean squared error "
            f"{min(errors):.3g}, variance {label_variance:.3g}), which no correlation shows; scale the labels to a "
            "mean near 0 and a deviation near 1, or train longer"
        )
    first, last = mean_loss(log, 0, 1 / 6), mean_loss(log, 5 / 6, 1)
    if first is not None and last is not None and last > _RISE * first:
        found.append(f"the training loss rose from {first:.3f} to {last:.3f}; lower training.learning_rate")
    return found


def mean_loss(log: list[dict[str, Any]], start: float, end: float) -> float | None:
    """Return the mean training loss after a share `start` of the steps and up to `end`; None if none was logged."""
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    steps = max((step for step, _ in points), default=0)
    losses = [loss for step, loss in points if start * steps < step <= end * steps]
    return sum(losses) / len(losses) if losses else None


def _single_prediction(by_class: dict[str, Any]) -> str | None:
    """Return the class that all rows were given; None if there are several, or too many classes to know."""
    if "confusion" not in by_class:
        return None
    predicted = [name for name, rows in zip(by_class["classes"], zip(*by_class["confusion"], strict=True), strict=True)
                 if any(rows)]  # fmt: skip
    present = sum(scores["rows"] > 0 for scores in by_class["classes"].values())
    return predicted[0] if len(predicted) == 1 and present > 1 else None
