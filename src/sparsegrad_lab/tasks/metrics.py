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


def _accuracy(labels: Array, predictions: Array) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(labels: Array, predictions: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _macro_f1(labels: Array, predictions: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def _matthews_correlation(labels: Array, predictions: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: Array, predictions: Array) -> float:
    from scipy.stats import pearsonr

    return 0.0 if _constant(labels, predictions) else float(pearsonr(labels, predictions).statistic)


def _spearman(labels: Array, predictions: Array) -> float:
    from scipy.stats import spearmanr

    return 0.0 if _constant(labels, predictions) else float(spearmanr(labels, predictions).statistic)


def _constant(*values: Array) -> bool:
    """Return True if the correlation of the values is undefined."""
    import numpy as np

    return any(len(found) < 2 or np.ptp(found) == 0 for found in values)


def _loss(tokens: Array, losses: Array) -> float:
    import numpy as np

    return float(losses.sum(dtype=np.float64) / tokens.sum())


def _perplexity(tokens: Array, losses: Array) -> float:
    try:
        return math.exp(_loss(tokens, losses))
    except OverflowError:
        return math.inf


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews_correlation,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "loss": _loss,
    "perplexity": _perplexity,
}
"""Name -> function of (labels, predictions). "f1" is the score of class 1, as in GLUE.

For language models the labels are the number of learnt tokens per row, and the predictions their summed losses.
"""

_CORRELATIONS = ("pearson", "spearmanr")


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


def score(names: Sequence[str], labels: Array, predictions: Array) -> dict[str, float]:
    """Return the metrics by name, with the mean of several as "combined_score" (not for losses).

    Args:
        names: keys of `METRICS`.
        labels: (rows,), class numbers or values.
        predictions: (rows,), class numbers or values.
    """
    found = {name: METRICS[name](labels, predictions) for name in names}
    if main_metric(names) == "combined_score":
        found["combined_score"] = sum(found.values()) / len(found)
    return found


def predictions_of(logits: Array, regression: bool) -> Array:
    """Return class numbers from logits (rows, classes), or values from (rows, 1).

    Raises:
        ValueError: the logits are not finite.
    """
    check_finite(logits)
    predictions: Array = logits.reshape(-1) if regression else logits.argmax(axis=-1)
    return predictions


def check_finite(outputs: Array) -> None:
    """Raise ValueError if the model's outputs are not finite."""
    import numpy as np

    if not np.isfinite(outputs).all():
        raise ValueError("the model's output is not finite; lower the learning rate, or use float32")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1); the deviation of a single value is 0."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
