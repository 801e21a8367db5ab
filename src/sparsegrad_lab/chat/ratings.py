"""Mean ratings and shares of wins by category and model, with bootstrap intervals over questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOTAL = "all questions"
"""Names the mean of all categories; a category may be named "all"."""
_RESAMPLES = 10_000
_WINS = {"model_2": 1.0, "tie": 0.5, "model_1": 0.0}


@dataclass(frozen=True)
class Mean:
    """A mean over questions with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    questions: int

    def __str__(self) -> str:
        if self.questions < 2:  # nothing to resample
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def table_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Mean]]:
    """Model -> `TOTAL`, "turn 1", "turn 2" and each category -> mean.

    Of single-answer grading: the mean rating. Of comparisons: the second model's share of wins, where a tie counts
    half. Rows without a rating are left out; see `unrated`.
    """
    values: dict[str, dict[str, dict[Any, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        value = _value(row)
        if value is not None:
            model = row.get("model") or row["model_2"]
            for name in (TOTAL, f"turn {row['turn']}", row["category"]):
                values[model][name][row["question_id"]].append(value)
    return {
        model: {
            name: bootstrap([sum(turns) / len(turns) for turns in questions.values()])
            for name, questions in names.items()
        }
        for model, names in values.items()
    }


def unrated(rows: Sequence[dict[str, Any]]) -> int:
    """The number of rows without a rating."""
    return sum(_value(row) is None for row in rows)


def bootstrap(values: Sequence[float]) -> Mean:
    """Mean of one value a question, and the percentiles of the means of resampled questions (the same in each run)."""
    found = np.asarray(values)
    picks = np.random.default_rng(0).integers(len(found), size=(_RESAMPLES, len(found)))
    low, high = np.percentile(found[picks].mean(axis=1), [2.5, 97.5])
    return Mean(float(found.mean()), float(low), float(high), len(found))


def _value(row: dict[str, Any]) -> float | None:
    """The rating; or 1 if the second model won in both orders, 0 if the first did, 0.5 otherwise."""
    if "score" in row:
        score: float | None = row["score"]
        return score
    first, second = row["g1_winner"], row["g2_winner"]
    if first is None or second is None:
        return None
    return _WINS[first] if first == second else _WINS["tie"]
