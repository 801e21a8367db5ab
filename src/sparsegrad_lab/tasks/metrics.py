"""Official metrics, computed by scikit-learn and SciPy, and the loss of a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from .task import LANGUAGE, TEXT


def _correlation(function: Callable[..., object]) -> Callable[..., float]:
    def score(labels: NDArray[np.generic], predictions: NDArray[np.generic]) -> float:
        if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0  # undefined: a constant goes with nothing
        return float(function(labels, predictions).statistic)  # type: ignore[attr-defined]

    return score


def _per_token(tokens: NDArray[np.generic], losses: NDArray[np.generic]) -> float:
    return float(losses.sum(dtype=np.float64) / tokens.sum())


def _perplexity(tokens: NDArray[np.generic], losses: NDArray[np.generic]) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(_per_token(tokens, losses)))


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": lambda labels, predictions: float(accuracy_score(labels, predictions)),
    "f1": lambda labels, predictions: float(f1_score(labels, predictions, zero_division=0.0)),
    "macro_f1": lambda labels, predictions: float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
    "matthews_correlation": lambda labels, predictions: float(matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
    "loss": _per_token,
    "perplexity": _perplexity,
}
"""Name -> (labels, predictions) -> score. `f1` is that of class 1, as GLUE has it.

Of a language model, the labels of a row are how many tokens of it are learnt, and its prediction is their summed loss.
"""

_CORRELATIONS, LOSSES = ("pearson", "spearmanr"), ("loss", "perplexity")


def higher_is_better(metric: str) -> bool:
    """A metric's direction; also for "combined_score"."""
    return metric not in LOSSES


def main_metric(names: Sequence[str]) -> str:
    """The one that decides which evaluation is the best: the only one, the mean of several, or the first of losses."""
    return names[0] if len(names) == 1 or not higher_is_better(names[0]) else "combined_score"


def fitting(labels: Sequence[str] | None, kind: str = TEXT) -> list[str]:
    """Names of the metrics for such labels (None: a number to predict) in a task of such a kind."""
    if kind == LANGUAGE:
        return list(LOSSES)
    if labels is None:
        return list(_CORRELATIONS)
    return [name for name in METRICS if name not in (*LOSSES, *_CORRELATIONS)]


def check_metrics(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not known."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"expected metrics among {', '.join(METRICS)}; found {', '.join(unknown)}")


def check_fit(names: Sequence[str], labels: Sequence[str] | None, kind: str = TEXT) -> None:
    """Raise ValueError for a metric that is not for such labels, which would come out after the first epoch only."""
    there = fitting(labels, kind)
    for name in names:
        if name not in there:
            takes = "a number to predict takes" if labels is None else "classes take"
            takes = f"{kind} takes" if kind == LANGUAGE else takes
            raise ValueError(f"metrics: {takes} {', '.join(there)}; found {name}")
        if name == "f1" and labels is not None and len(labels) != 2:
            raise ValueError(f"metrics: f1 is that of class 1 of two, found {len(labels)} classes; use macro_f1")


def score(names: Sequence[str], labels: NDArray[np.generic], predictions: NDArray[np.generic]) -> dict[str, float]:
    """All of the metrics, and for several their mean as "combined_score", unless they are losses.

    Args:
        names: keys of `METRICS`.
        labels: (rows,), class numbers or values.
        predictions: (rows,), likewise.
    """
    found = {name: METRICS[name](labels, predictions) for name in names}
    if main_metric(names) == "combined_score":
        found["combined_score"] = sum(found.values()) / len(found)
    return found


def predictions_of(logits: NDArray[np.generic], regression: bool) -> NDArray[np.generic]:
    """Class numbers, or values, from a classifier's output (rows, classes) or (rows, 1).

    Raises:
        ValueError: the output holds entries that are not finite.
    """
    check_finite(logits)
    if regression:
        values: NDArray[np.generic] = logits.reshape(-1)
        return values
    classes: NDArray[np.generic] = logits.argmax(axis=-1)
    return classes


def check_finite(output: NDArray[np.generic]) -> None:
    """Raise ValueError for a model's output that holds entries that are not finite."""
    if not np.isfinite(output).all():
        raise ValueError("the model's output is not finite; lower the learning rate, or use float32")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample: n - 1), 0 for a single value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
