"""Means and bootstrap intervals, from ratings that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap as reference

from sparsegrad_lab.chat.ratings import TOTAL, bootstrap, table_of, unrated


def test_the_interval_is_scipys() -> None:
    values = np.random.default_rng(1).integers(1, 11, 80).astype(float)
    found = bootstrap(list(values))
    expected = reference((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2))
    assert found.mean == values.mean()
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.1)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.1)


def test_means_by_category_and_turn() -> None:
    """Question 3 has no rating: it is left out and counted, not taken as 0."""
    rows = [
        {"question_id": number, "turn": turn, "category": category, "model": "m", "score": score}
        for number, turn, category, score in [
            (1, 1, "math", 4.0), (1, 2, "math", 2.0), (2, 1, "stem", 9.0), (2, 2, "stem", 7.0), (3, 1, "stem", None),
        ]
    ]  # fmt: skip
    means = {name: found.mean for name, found in table_of(rows)["m"].items()}
    assert means == {TOTAL: 5.5, "turn 1": 6.5, "turn 2": 4.5, "math": 3.0, "stem": 8.0}
    assert unrated(rows) == 1
    assert str(table_of(rows)["m"]["math"]) == "3.00"  # of one question there is no interval


def test_a_winner_wins_in_both_orders() -> None:
    games = [("model_2", "model_2"), ("model_1", "model_2"), ("model_1", "model_1"), ("model_2", None)]
    rows = [
        {"question_id": number, "turn": 1, "category": "math", "model_1": "a", "model_2": "b", "g1_winner": first,
         "g2_winner": second}
        for number, (first, second) in enumerate(games)
    ]  # fmt: skip
    assert table_of(rows)["b"][TOTAL].mean == pytest.approx((1 + 0.5 + 0) / 3)
    assert unrated(rows) == 1


def test_a_category_named_all() -> None:
    rows = [
        {"question_id": number, "turn": 1, "category": category, "model": "m", "score": score}
        for number, category, score in [(1, "all", 4.0), (2, "math", 2.0)]
    ]
    found = table_of(rows)["m"]
    assert (found["all"].mean, found[TOTAL].mean) == (4.0, 3.0)
