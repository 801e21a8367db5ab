"""Means and spreads of scores, and differences between methods with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from .runs import Run
from .sections import Section

FEWEST = 6
"""Pairs that a difference needs to be called significant. All of five pairs point the same way once in sixteen times by
chance, and so few differences do not show whether they are normally distributed, as the t-test assumes."""

FEWEST_TASKS = 5
"Tasks that the bootstrap needs: with two or three, its interval of 95 % covers 50 to 85 % (a test simulates it)."

_DRAWS = 10_000
"Samples of the bootstrap."
_ROUNDING = 1e-9
"Differences below it are rounding."


@dataclass(frozen=True)
class Comparison:
    """A method against another, over the runs of one unit that have the same task and seed."""

    method: str
    other: str
    pairs: int
    difference: float
    "mean, in the unit of the scores"
    low: float
    "lower end of the 95 % interval of the mean (Student's t); nan with fewer than two pairs, and without spread"
    high: float
    p: float
    "of the paired t-test; nan likewise"
    ahead: int
    "pairs in which the method has the better score"
    tasks: int
    p_tasks: float
    "of the same test over the means of the tasks, whose runs share rows and a learning rate; nan likewise"
    differences: pd.Series = field(compare=False, repr=False)
    "of the pairs, by (task, seed)"
    needed: int | None = None
    "pairs for an interval of half a point on either side; None for other units, and with fewer than two pairs"
    unit: str = "points"

    def __str__(self) -> str:
        """The comparison for readers who have not seen the tables; whether it is significant stands first."""
        if not self.pairs:
            return f"{self.method} and {self.other} have no task and seed in common."
        points = self.unit == "points"
        digits, unit = (2, "points") if points else (4, f"in {self.unit} (lower is better)")
        pairs = f"{self.pairs} pair{'s' if self.pairs > 1 else ''} of runs"
        tasks = f" on {self.tasks} tasks" if self.tasks > 1 else ""
        found = f"{self.difference:+.{digits}f} {unit} over {pairs}{tasks}, ahead in {self.ahead}"
        if not math.isnan(self.low):
            found += f" (95 % interval {self.low:+.{digits}f} to {self.high:+.{digits}f})"
        if self.conclusion != "significant":
            return f"{self.method} against {self.other}: {self.conclusion}. {found}."
        better = (self.difference > 0) == points
        return f"{self.method} is {'better' if better else 'worse'} than {self.other}: {found}."

    @property
    def conclusion(self) -> str:
        """Whether the difference is significant at 5 %, over the pairs and over the tasks."""
        if self.pairs < FEWEST:
            return "too few runs to tell"
        if math.isnan(self.low):
            return f"all pairs {'differ by the same amount' if self.difference else 'are equal'}"
        if self.low <= 0 <= self.high:
            return "no significant difference"
        same_sign = self.difference * self.by_task.mean() > 0  # a task with many pairs can outvote all others
        over_tasks = self.tasks < 2 or (self.p_tasks < 0.05 and same_sign)
        return "significant" if over_tasks else "significant over these runs, but not over tasks"

    @property
    def by_task(self) -> pd.Series:
        """Mean difference of the pairs of each task."""
        return self.differences.groupby(level="task").mean()


def score_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Scores by (task, seed), a column for each method; nan where there is no run. All runs of one unit."""
    rows = [(run.task_name, run.seed, run.method_name, run.value) for run in runs]
    frame = pd.DataFrame(rows, columns=["task", "seed", "method", "score"])
    return frame.pivot_table(index=["task", "seed"], columns="method", values="score", aggfunc="last", sort=False)


def by_unit(section: Section) -> dict[str, Section]:
    """Parts of a section whose scores can be averaged, points first."""
    runs: dict[str, list[Run]] = {"points": []}
    for run in section.runs:
        runs.setdefault(run.unit, []).append(run)
    with_loss = {run.task_name for unit, some in runs.items() if unit != "points" for run in some}
    parts = {}
    for unit, some in runs.items():
        own = {run.task_name for run in some}
        tasks = [task for task in section.tasks if (task not in with_loss if unit == "points" else task in own)]
        if some:
            parts[unit] = replace(section, runs=tuple(some), tasks=tuple(tasks))
    return parts


def common_seeds(section: Section) -> set[int]:
    """Seeds that every method with runs on all tasks has on each of them."""
    return _common_seeds(score_table(section.runs), section.tasks)


def _common_seeds(scores: pd.DataFrame, tasks: Sequence[str]) -> set[int]:
    with_run = {method: own[own.notna()].index for method, own in scores.items()}
    seeds = [
        {seed for task, seed in index if task == wanted}
        for index in with_run.values()
        if set(tasks) <= {task for task, _ in index}
        for wanted in tasks
    ]
    return set.intersection(*seeds) if seeds else set()


def means_of_tasks(section: Section) -> dict[str, float]:
    """Mean over tasks of each method's means over seeds, of runs of one unit; nan unless it has run on all tasks.

    Only the seeds of `common_seeds` count, if there are any. Otherwise a method would gain from a seed that is easy for
    all of them and that it alone has run.
    """
    scores = score_table(section.runs)
    if seeds := _common_seeds(scores, section.tasks):
        scores = scores[scores.index.get_level_values("seed").isin(seeds)]
    by_task = scores.groupby(level="task").mean().reindex(index=section.tasks, columns=list(section.methods))
    return {str(method): float(mean) for method, mean in by_task.mean(skipna=False).items()}


def at_last_evaluation(section: Section) -> Section:
    """The section with the score of each run's last evaluation in place of its best.

    A run keeps its score if other rows are scored than evaluated while it trains.
    """

    def last(run: Run) -> Run:
        score = run.evaluations[-1].get(run.metric) if run.evaluations and not run.rows.development else None
        return run if score is None else run.model_copy(update={"score": score})

    return replace(section, runs=tuple(map(last, section.runs)))


def compare(runs: Sequence[Run], method: str, other: str) -> Comparison:
    """Compare two methods over all pairs of runs with the same task and seed; all runs of one unit."""
    return compare_all(runs, [method], other)[0]


def compare_all(runs: Sequence[Run], methods: Iterable[str], other: str) -> list[Comparison]:
    """Compare each of several methods with another, see `compare`."""
    scores = score_table(runs)
    better = 1 if not runs or runs[0].higher_is_better else -1
    unit = runs[0].unit if runs else "points"
    found = []
    for method in methods:
        pairs = scores.reindex(columns=[method, other]).dropna()
        difference = pairs[method] - pairs[other]
        difference = difference.where(difference.abs() >= _ROUNDING, 0.0)
        low, high, p = _t_test(difference)
        of_tasks = difference.groupby(level="task").mean()
        found.append(
            Comparison(
                method=method, other=other, pairs=len(pairs), difference=float(difference.mean()), low=low, high=high,
                p=p, ahead=int((better * difference > 0).sum()), tasks=len(of_tasks), p_tasks=_t_test(of_tasks)[2],
                differences=difference, needed=pairs_needed(difference) if unit == "points" else None, unit=unit,
            )
        )  # fmt: skip
    return found


def pairs_needed(differences: Sequence[float] | pd.Series, half_width: float = 0.5) -> int | None:
    """Return about how many pairs make the 95 % interval of the mean this wide on either side, and at least `FEWEST`.

    None below two pairs. The interval is Student's t, and the spread is that of the pairs so far.
    """
    from scipy.stats import t

    if len(differences) < 2:
        return None
    spread = float(np.std(differences, ddof=1))
    pairs = max(FEWEST, math.ceil((1.96 * spread / half_width) ** 2))  # 1.96: t of infinitely many pairs
    while t.ppf(0.975, pairs - 1) * spread / math.sqrt(pairs) > half_width:
        pairs += 1
    return pairs


def hierarchical_bootstrap(difference: pd.Series) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean over tasks, if tasks were drawn anew and then seeds within each task.

    Differences are by (task, seed); nan below `FEWEST_TASKS`.
    """
    by_task = [own.to_numpy() for _, own in difference.groupby(level="task")]
    if len(by_task) < FEWEST_TASKS:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(by_task), size=(_DRAWS, len(by_task)))
    means = np.empty(chosen.shape)
    for task, own in enumerate(by_task):
        here = chosen == task
        seeds = generator.integers(len(own), size=(int(here.sum()), len(own)))
        means[here] = own[seeds].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _t_test(differences: pd.Series) -> tuple[float, float, float]:
    """Ends of the 95 % interval of the mean, and p of the hypothesis that it is 0.

    nan below two differences, and if all are equal: there is no spread to estimate.
    """
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or np.ptp(differences) < _ROUNDING:
        return math.nan, math.nan, math.nan
    test = ttest_1samp(differences, 0)
    interval = test.confidence_interval()
    return float(interval.low), float(interval.high), float(test.pvalue)
