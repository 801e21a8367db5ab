"""Metrics, compared with scikit-learn, SciPy and values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from sparsegrad_lab.tasks.metrics import METRICS, predictions_of, score, scores_by_class
from sparsegrad_lab.tasks.task import higher_is_better, main_metric
from sparsegrad_peft import TrainingDivergedError

LABELS = np.array([1, 1, 1, 0, 0, 1])
FOUND = np.array([1, 0, 1, 0, 1, 1])  # 3 true and 1 false positive, 1 true and 1 false negative


def test_by_hand() -> None:
    found = score(["accuracy", "f1", "matthews_correlation"], LABELS, FOUND)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["matthews_correlation"] == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))
    assert found["combined_score"] == pytest.approx((4 / 6 + 3 / 4 + 1 / 4) / 3)
    assert score(["macro_f1"], LABELS, FOUND) == {"macro_f1": pytest.approx((3 / 4 + 1 / 2) / 2)}


def test_correlations_by_hand() -> None:
    """Ranks 1 2 3 4 against 2 1 3 4: Spearman 1 - 6·2/(4·15)."""
    found = score(["pearson", "spearmanr"], np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 3.0, 10.0]))
    assert found["spearmanr"] == pytest.approx(0.8)
    # Deviations (-1.5, -.5, .5, 1.5) and (-2, -3, -1, 6): 13 / sqrt(5 · 50).
    assert found["pearson"] == pytest.approx(13 / math.sqrt(250))


@pytest.mark.parametrize("seed", range(3))
def test_against_the_libraries(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels, found = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    assert METRICS["accuracy"](labels, found) == sk.accuracy_score(labels, found)
    assert METRICS["f1"](labels, found) == sk.f1_score(labels, found)
    assert METRICS["macro_f1"](labels, found) == sk.f1_score(labels, found, average="macro")
    assert METRICS["matthews_correlation"](labels, found) == sk.matthews_corrcoef(labels, found)
    values, predicted = generator.normal(size=50), generator.normal(size=50)
    assert METRICS["pearson"](values, predicted) == stats.pearsonr(values, predicted)[0]
    assert METRICS["spearmanr"](values, predicted) == stats.spearmanr(values, predicted)[0]


@pytest.mark.parametrize(
    ("name", "expected"), [("f1", 0.0), ("matthews_correlation", 0.0), ("pearson", 0.0), ("spearmanr", 0.0)]
)
def test_constant_predictions(name: str, expected: float) -> None:
    """The formulas are undefined; the metric is 0, without a warning."""
    assert METRICS[name](LABELS.astype(float), np.zeros(6)) == expected


def test_predictions() -> None:
    logits = np.array([[0.1, 0.9, 0.0], [2.0, 1.0, 1.5]])
    assert predictions_of(logits, regression=False).tolist() == [1, 0]
    assert predictions_of(np.array([[0.5], [-1.0]]), regression=True).tolist() == [0.5, -1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    with pytest.raises(TrainingDivergedError, match="not finite; lower the learning rate"):
        predictions_of(np.array([[0.0, bad]]), regression=False)


def test_perplexity_of_a_huge_loss() -> None:
    """exp overflows."""
    assert score(["perplexity"], np.array([1.0]), np.array([1e4])) == {"perplexity": math.inf}
    assert score(["loss", "perplexity"], np.array([2.0, 2.0]), np.array([4.0, 0.0])) == {
        "loss": 1.0, "perplexity": pytest.approx(math.e),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "main"),
    [
        (["accuracy"], "accuracy"),
        (["accuracy", "f1"], "combined_score"),
        (["loss", "perplexity"], "loss"),
        (["perplexity"], "perplexity"),
    ],
)
def test_the_metric_that_selects_the_best_evaluation(metrics: list[str], main: str) -> None:
    assert main_metric(metrics) == main
    assert higher_is_better(main) == (main not in ("loss", "perplexity"))


def test_scores_by_class() -> None:
    """A class that is never predicted, and one without rows, have 0; nothing is undefined."""
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1])
    found = scores_by_class(["a", "b", "c", "d"], labels, predictions)
    assert found["classes"]["a"] == pytest.approx({"precision": 1, "recall": 2 / 3, "f1": 0.8, "rows": 3})
    assert found["classes"]["b"] == pytest.approx({"precision": 0.5, "recall": 1, "f1": 2 / 3, "rows": 2})
    assert found["classes"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "rows": 1}
    assert found["classes"]["d"] == {"precision": 0, "recall": 0, "f1": 0, "rows": 0}
    assert found["confusion"] == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    many = scores_by_class([str(n) for n in range(101)], labels, predictions)
    assert (len(many["classes"]), "confusion" in many) == (101, False)
