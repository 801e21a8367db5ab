"""Official metrics, computed by scikit-learn and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def _correlation(function: Callable[..., object]) -> Callable[..., float]:
    def score(labels: NDArray[np.generic], predictions: NDArray[np.generic]) -> float:
        if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0  # undefined: a constant goes with nothing
        return float(function(labels, predictions).statistic)  # type: ignore[attr-defined]

    return score


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": lambda labels, predictions: float(accuracy_score(labels, predictions)),
    "f1": lambda labels, predictions: float(f1_score(labels, predictions, zero_division=0.0)),
    "macro_f1": lambda labels, predictions: float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
    "matthews_correlation": lambda labels, predictions: float(matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}
"""Name -> (labels, predictions) -> score; higher is better. `f1` is that of class 1, as GLUE has it."""


def check_metrics(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not known."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"expected metrics among {', '.join(METRICS)}; found {', '.join(unknown)}")


def check_fit(names: Sequence[str], labels: Sequence[str] | None) -> None:
    """Raise ValueError for a metric that is not for such labels, which would come out after the first epoch only."""
    correlations = ("pearson", "spearmanr")
    for name in names:
        if (labels is None) != (name in correlations):
            kind = "a number to predict takes" if labels is None else "classes take"
            fitting = [known for known in METRICS if (known in correlations) == (labels is None)]
            raise ValueError(f"metrics: {kind} {', '.join(fitting)}; found {name}")
        if name == "f1" and labels is not None and len(labels) != 2:
            raise ValueError(f"metrics: f1 is that of class 1 of two, found {len(labels)} classes; use macro_f1")


def score(names: Sequence[str], labels: NDArray[np.generic], predictions: NDArray[np.generic]) -> dict[str, float]:
    """All of the metrics, and for several their mean as "combined_score".

    Args:
        names: keys of `METRICS`.
        labels: (rows,), class numbers or values.
        predictions: (rows,), likewise.
    """
    found = {name: METRICS[name](labels, predictions) for name in names}
    if len(found) > 1:
        found["combined_score"] = sum(found.values()) / len(found)
    return found


def predictions_of(logits: NDArray[np.generic], regression: bool) -> NDArray[np.generic]:
    """Class numbers, or values, from a classifier's output (rows, classes) or (rows, 1).

    Raises:
        ValueError: the output holds entries that are not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the model's output is not finite; lower the learning rate, or use float32")
    if regression:
        values: NDArray[np.generic] = logits.reshape(-1)
        return values
    classes: NDArray[np.generic] = logits.argmax(axis=-1)
    return classes


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample: n - 1), 0 for a single value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
