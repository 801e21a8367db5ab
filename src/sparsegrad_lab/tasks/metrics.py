"""Metrics of tasks. Importing this module is cheap: scikit-learn and SciPy are loaded when a score is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .task import LANGUAGE, LOSSES, TEXT, main_metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]


def _sklearn(function: str, **options: Any) -> Callable[[Array, Array], float]:
    def metric(labels: Array, predictions: Array) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, function)(labels, predictions, **options))

    return metric


def _correlation(function: str) -> Callable[[Array, Array], float]:
    def metric(labels: Array, predictions: Array) -> float:
        import scipy.stats

        if len(set(labels.tolist())) < 2 or len(set(predictions.tolist())) < 2:
            return 0.0  # undefined for constant values
        return float(getattr(scipy.stats, function)(labels, predictions).statistic)

    return metric


def _loss(tokens: Array, losses: Array) -> float:
    import numpy as np

    return float(losses.sum(dtype=np.float64) / tokens.sum())


def _perplexity(tokens: Array, losses: Array) -> float:
    try:
        return math.exp(_loss(tokens, losses))
    except OverflowError:
        return math.inf


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _sklearn("accuracy_score"),
    "f1": _sklearn("f1_score", zero_division=0.0),
    "macro_f1": _sklearn("f1_score", average="macro", zero_division=0.0),
    "matthews_correlation": _sklearn("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearmanr": _correlation("spearmanr"),
    "loss": _loss,
    "perplexity": _perplexity,
}
"""Name -> function of (labels, predictions). "f1" is the score of class 1; `score` chooses the class.

For language models the labels are the number of learnt tokens per row, and the predictions their summed losses.
"""

_CORRELATIONS = ("pearson", "spearmanr")

LARGEST_CONFUSION = 100
"""Most classes of a confusion matrix in a result file, which would otherwise be mostly zeros."""


def metrics_for(labels: Sequence[str] | None, kind: str = TEXT) -> list[str]:
    """Return the metrics that a task can have; `labels` is None for regression."""
    if kind == LANGUAGE:
        return list(LOSSES)
    if labels is None:
        return list(_CORRELATIONS)
    return [name for name in METRICS if name not in (*LOSSES, *_CORRELATIONS)]


def check_metrics(names: Sequence[str], labels: Sequence[str] | None, kind: str = TEXT) -> None:
    """Raise ValueError for a metric that does not fit the labels; `labels` is None for regression."""
    known = metrics_for(labels, kind)
    for name in names:
        if name not in known:
            what = "language models" if kind == LANGUAGE else "regression" if labels is None else "classes"
            raise ValueError(f"data.metrics: expected for {what} {', '.join(known)}; found {name}")
        if name == "f1" and labels is not None and len(labels) != 2:
            raise ValueError(f"data.metrics: f1 is for two classes, found {len(labels)}; use macro_f1")


def score(names: Sequence[str], labels: Array, predictions: Array, positive: int = 1) -> dict[str, float]:
    """Return the metrics by name, with the mean of several as "combined_score" (not for losses).

    Args:
        names: keys of `METRICS`.
        labels: (rows,), class numbers or values.
        predictions: (rows,), class numbers or values.
        positive: number of the class that "f1" scores.
    """
    found = {
        name: METRICS[name](*((labels == positive, predictions == positive) if name == "f1" else (labels, predictions)))
        for name in names
    }
    if main_metric(names) == "combined_score":
        found["combined_score"] = sum(found.values()) / len(found)
    return found


def scores_by_class(names: Sequence[str], labels: Array, predictions: Array) -> dict[str, Any]:
    """Return precision, recall, F1 and number of rows of each class, and the confusion matrix.

    Args:
        names: class names in the order of their numbers.
        labels: (rows,), class numbers.
        predictions: (rows,), class numbers.

    Returns:
        "classes": name -> {"precision", "recall", "f1", "rows"}. "confusion": (classes, classes), the number of rows by
        true class (row) and predicted class (column); only for at most `LARGEST_CONFUSION` classes.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers = list(range(len(names)))
    columns = precision_recall_fscore_support(labels, predictions, labels=numbers, zero_division=0.0)
    found: dict[str, Any] = {
        "classes": {
            name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}
            for name, precision, recall, f1, rows in zip(names, *columns, strict=True)
        }
    }
    if len(names) <= LARGEST_CONFUSION:
        found["confusion"] = confusion_matrix(labels, predictions, labels=numbers).tolist()
    return found


def predictions_of(logits: Array, regression: bool) -> Array:
    """Return class numbers from logits (rows, classes), or values from (rows, 1).

    Raises:
        TrainingDivergedError: the logits are not finite.
    """
    check_finite(logits)
    predictions: Array = logits.reshape(-1) if regression else logits.argmax(axis=-1)
    return predictions


def check_finite(outputs: Array) -> None:
    """Raise TrainingDivergedError if the model's outputs are not finite."""
    import numpy as np

    from sparsegrad_peft import TrainingDivergedError

    if not np.isfinite(outputs).all():
        raise TrainingDivergedError("the model's output is not finite; lower the learning rate, or use float32")
