"""Runs -> mean and spread of each method on each task, and differences from one method with their uncertainty."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..tasks.metrics import spread
from .results import Run, Section

FEWEST = 6
"""Pairs from which on a difference may be called beyond chance: five on one side are what coins do once in sixteen, and
whether so few differences are normally distributed, as the t-test supposes, nobody can see."""


@dataclass(frozen=True)
class Cell:
    """A method on a task."""

    runs: tuple[Run, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return spread([run.score for run in self.runs])[0]

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds."""
        return spread([run.score for run in self.runs])[1]

    def __str__(self) -> str:
        shown = self.runs[0].shown
        return f"{shown(self.mean)} ± {shown(self.deviation)}" if len(self.runs) > 1 else shown(self.mean)


@dataclass(frozen=True)
class Comparison:
    """A method against another, over the runs of one unit that both have: same task, same seed."""

    method: str
    other: str
    pairs: int
    difference: float
    "mean, in the unit of the scores"
    low: float
    "95 % interval of the mean, by Student's t over the pairs"
    high: float
    p: float
    "of the paired t-test; nan with fewer than two pairs"
    ahead: int
    "pairs in which the method has the better score"
    tasks: int
    p_tasks: float
    "of the same test over the means of the tasks, whose runs share rows and a learning rate; nan with fewer than two"
    unit: str = "points"

    @property
    def words(self) -> str:
        """One sentence."""
        if not self.pairs:
            return f"{self.method} and {self.other} have no task and seed in common."
        digits, unit = (2, "points") if self.unit == "points" else (4, f"{self.unit} (lower is better)")
        least = f"{self.difference:+.{digits}f} {unit} over {self.pairs} pair{'s' if self.pairs > 1 else ''} of runs"
        if math.isnan(self.p):
            return f"{self.method} against {self.other}: {least}; too few for a test."
        if self.pairs < FEWEST:
            sure = "too few pairs to tell"
        elif self.low <= 0 <= self.high:
            sure = "not told apart from chance"
        else:
            sure = "beyond chance" if self.tasks < 2 or self.p_tasks < 0.05 else "but not beyond chance over tasks"
        over = "" if self.tasks < 2 else f", over the means of {self.tasks} tasks p = {self.p_tasks:.2g}"
        return (
            f"{self.method} against {self.other}: {least} (95 % interval {self.low:+.{digits}f} to "
            f"{self.high:+.{digits}f}, paired t-test p = {self.p:.2g}{over}; {sure}), ahead in {self.ahead}."
        )


def cells(runs: Iterable[Run]) -> dict[str, dict[str, Cell]]:
    """Task -> method -> cell, in the order in which they are met."""
    found: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run.task][run.method].append(run)
    return {
        task: {method: Cell(tuple(sorted(some, key=lambda run: run.result["seed"]))) for method, some in by.items()}
        for task, by in found.items()
    }


def by_unit(section: Section) -> dict[str, Section]:
    """Parts of a section whose scores can be averaged, points first."""
    found: dict[str, list[Run]] = {"points": []}
    for run in section.runs:
        found.setdefault(run.unit, []).append(run)
    apart = {run.task for unit, some in found.items() for run in some if unit != "points"}

    def tasks(unit: str, some: list[Run]) -> tuple[str, ...]:
        """Those that have no runs yet count as points."""
        own = {run.task for run in some}
        return tuple(task for task in section.tasks if (task not in apart if unit == "points" else task in own))

    return {unit: replace(section, runs=tuple(some), tasks=tasks(unit, some)) for unit, some in found.items() if some}


def common_seeds(section: Section) -> set[int]:
    """Seeds that every method which has run on all tasks has run on each of them."""
    table = cells(section.runs)
    seeds = [
        {run.result["seed"] for run in table[task][method].runs}
        for method in section.methods
        if all(method in table.get(task, {}) for task in section.tasks)
        for task in section.tasks
    ]
    return set.intersection(*seeds) if seeds else set()


def mean_of_tasks(section: Section, method: str) -> float:
    """Mean over tasks of the means over seeds, of runs of one unit; nan unless the method has run on all of them.

    The seeds are those that all such methods have run on all tasks, where there are any: a seed that is good for all
    would otherwise count for those alone that have run it.
    """
    same = common_seeds(section)
    table = cells(run for run in section.runs if not same or run.result["seed"] in same)
    found = [table[task][method].mean if method in table.get(task, {}) else math.nan for task in section.tasks]
    return sum(found) / len(found) if found else math.nan


def at_the_end(section: Section) -> Section:
    """The same runs with the score of their last evaluation in place of the best one's."""

    def last(run: Run) -> Run:
        evaluations = run.result.get("evaluations") or [{}]
        return replace(run, result={**run.result, "score": evaluations[-1].get(run.metric, run.result["score"])})

    return replace(section, runs=tuple(map(last, section.runs)))


def compare(runs: Sequence[Run], method: str, other: str) -> Comparison:
    """Paired by task and seed; all runs of one unit."""
    scores: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for run in runs:
        scores[run.method][run.task, run.result["seed"]] = run.score
    both = sorted(scores[method].keys() & scores[other].keys())
    differences = {key: scores[method][key] - scores[other][key] for key in both}
    mean, low, high, p = _t_test(list(differences.values()))
    of_task: dict[str, list[float]] = defaultdict(list)
    for (task, _), difference in differences.items():
        of_task[task].append(difference)
    p_tasks = _t_test([sum(some) / len(some) for some in of_task.values()])[3]
    better = 1 if not runs or runs[0].higher_is_better else -1
    ahead = sum(better * difference > 0 for difference in differences.values())
    unit = runs[0].unit if runs else "points"
    return Comparison(method, other, len(both), mean, low, high, p, ahead, len(of_task), p_tasks, unit)


def _t_test(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, 95 % interval of it, and p of Student's t that it is 0; nan where there are too few."""
    from scipy import stats

    n = len(differences)
    mean = sum(differences) / n if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    margin = float(stats.t.ppf(0.975, n - 1)) * error
    return mean, mean - margin, mean + margin, float(2 * stats.t.sf(abs(mean) / error, n - 1))
