"""Tables of scores, comparisons, searches and runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from statistics import mean, stdev
from typing import TypeVar

from ..tasks.task import display_name
from .cost_tables import costs, costs_by_task
from .runs import Failure, Run
from .sections import Section
from .statistics import at_last_evaluation, by_unit, common_seeds, compare_all, hierarchical_bootstrap, means_of_tasks
from .table import Linked, Table

_Found = TypeVar("_Found", Run, Failure)


def tables_of(section: Section) -> dict[str, Table]:
    """The tables of a section, by the names of their files."""
    tables = {"scores": scores(section)} if section.scored else {}
    if section.scored and section.baseline in section.methods and len(section.methods) > 1:
        tables["comparison"] = comparisons(section)
    if section.trials:
        tables["search"] = searches(section)
    if any(run.unrelated_perplexity for run in section.runs):
        tables["forgetting"] = forgetting(section)
    if section.runs:
        tables["costs"] = costs(section)
    if section.runs and len(section.tasks) > 1:
        tables["speed"] = costs_by_task(section)
    return tables


def scores(section: Section) -> Table:
    """Mean and spread over seeds: a row for each task, a column for each method."""
    rows = []
    for task in section.tasks:
        metrics = [display_name(run.metric) for run in section.runs_of(task)]
        row = [f"{task}, {metrics[0]}" if metrics else task]
        for method in section.methods:
            runs, failures = section.runs_of(task, method), section.failures_of(task, method)
            failed = ", ".join(f"{failure.status}: seed {failure.seed}" for failure in failures)
            if runs:
                text = f"{_mean_and_deviation(runs)} ({len(runs)})"
                row.append(Linked(f"{text}; {failed}" if failed else text, runs))
            else:
                row.append(failed or "not run")
        rows.append(row)
    units = by_unit(section)
    means = {
        unit: part
        for unit, part in (units or {"points": section}).items()
        if len(part.tasks) > 1 or (_seeds_differ(part) and common_seeds(part))
    }
    for unit, part in means.items():
        suffix = f", {unit}" if len(units) > 1 else ""
        best, last = _means(part), _means(at_last_evaluation(part))
        rows.append([f"{'mean of tasks' if len(part.tasks) > 1 else 'mean over common seeds'}{suffix}", *best])
        if last != best:
            rows.append([f"... at the last evaluation{suffix}", *last])
    losses = [unit for unit in units if unit != "points"]
    what = "100 x score" if "points" in units or not units else " or ".join(losses).capitalize()
    split = any(run.rows.development for run in section.runs)
    rows_scored = "rows that select neither checkpoint nor rate" if split else "the task's dev set"
    note = (
        f"{what} of each run's best checkpoint, on {rows_scored}: mean ± standard deviation over seeds (number of "
        "seeds)."
    )
    found = [part for part in means.values() if any(map(math.isfinite, means_of_tasks(part).values()))]
    if found and all(map(common_seeds, found)):
        note += " The means below the tasks are over the seeds that all methods of the row have run."
    elif found:
        note += " The mean of tasks is over all seeds, since no seed has run with all methods on all tasks."
    if losses:
        unlike = f" A {' or '.join(losses)} is not multiplied, and lower is better."
        note += unlike if "points" in units else " Lower is better."
    return Table("Scores", note, ["task", *section.methods], rows)


def _seeds_differ(section: Section) -> bool:
    """True if some methods have run seeds that others have not, so that their means cannot be compared as they are."""
    seeds = {frozenset(run.seed for run in section.runs_of(method=run.method_name)) for run in section.runs}
    return len(seeds) > 1


def _mean_and_deviation(runs: list[Run]) -> str:
    values = [run.value for run in runs]
    text = runs[0].format(mean(values))
    return f"{text} ± {runs[0].format(stdev(values))}" if len(values) > 1 else text


def _means(section: Section) -> list[str]:
    means = means_of_tasks(section)
    return [section.runs[0].format(mean) if math.isfinite(mean) else "not all run" for mean in means.values()]


def comparisons(section: Section) -> Table:
    """Every method against the baseline, paired by task and seed, next to the published difference."""
    baseline, units = section.baseline, by_unit(section)
    paper = section.paper or {}
    published = paper.get("scores", {}) if baseline in paper.get("scores", {}) else {}
    several_tasks = len(section.tasks) > 1
    rows = []
    for unit, part in units.items():
        show = partial(part.runs[0].format, digits=2, sign="+")
        others = [method for method in section.methods if method != baseline]
        for method, found in zip(others, compare_all(part.runs, others, baseline), strict=True):
            tested = not math.isnan(found.p)
            row = [
                f"{method}, {unit}" if unit != "points" else method, str(found.pairs),
                show(found.difference) if found.pairs else "",
                f"{show(found.low)} to {show(found.high)}" if tested else "", f"{found.p:.2g}" if tested else "",
            ]  # fmt: skip
            if several_tasks:
                low, high = hierarchical_bootstrap(found.differences)
                row += ["" if math.isnan(found.p_tasks) else f"{found.p_tasks:.2g}",
                        "" if math.isnan(low) else f"{show(low)} to {show(high)}"]  # fmt: skip
            row.append(f"{found.ahead} of {found.pairs}")
            if "points" in units:
                row.append("" if found.needed is None else str(found.needed))
            if published:
                theirs = zip(published.get(method, ()), published.get(baseline, ()), strict=False)
                digits = 1 if unit == "points" else 2
                row.append(", ".join(show(ours - other, digits=digits) for ours, other in theirs))
            rows.append(row)
    over_tasks = ["p over tasks", "bootstrap interval"] if several_tasks else []
    header = ["method", "pairs", f"difference from {baseline}", "95 % interval", "p (paired t-test)", *over_tasks,
              "ahead", *(["pairs for ± 0.5 points"] if "points" in units else [])]  # fmt: skip
    note = "Pairs of runs with the same task and seed."
    if "points" in units:
        note += (
            " A point is a hundredth of a score. Pairs for ± 0.5 points: about how many pairs a 95 % interval of half "
            "a point on either side needs."
        )
    if several_tasks:
        note += (
            " The runs of a task share its rows and a learning rate, so they are not independent; p over tasks is the "
            "same test over the means of the tasks. The bootstrap draws tasks, and then seeds within each task; "
            "each task counts the same there. Below five tasks it has no interval. With five to eight, "
            "the interval is still too narrow: it covers 80 to 95 %."
        )
    else:
        note += (
            " The runs share the scored rows and a learning rate: the test says what other seeds would give, and not "
            "what other rows or tasks would."
        )
    if len(section.methods) > 2:
        note += " Each row is a separate test. Among many tests, some fall below 0.05 by chance."
    if set(units) - {"points"}:
        note += " A difference in loss is negative where the method is ahead."
    if published:
        header.append(f"in the paper ({', '.join(paper['columns'])})")
        note += f" The paper's differences: {paper['source']}."
    return Table(f"Against {baseline}", note, header, rows)


def forgetting(section: Section) -> Table:
    """Gain of the score, and perplexity of texts that were not trained on: a column for each method."""
    rows = []
    for task in section.tasks:
        for name, show in (("gain", _gain), ("unrelated perplexity", _perplexity)):
            found = [show(section.runs_of(task, method)) for method in section.methods]
            if any(found):
                rows.append([f"{task}, {name}", *(text or "not measured" for text in found)])
    note = (
        "Unrelated perplexity: of texts that were not trained on, after training (change from before). A rise shows "
        "what the model forgot. Gain: by how much training improved the score. Means over seeds."
    )
    return Table("Forgetting", note, ["task", *section.methods], rows)


def _gain(runs: Iterable[Run]) -> Linked | None:
    """Mean gain of the runs that measured it."""
    measured = [(run, run.gain) for run in runs if run.gain is not None]
    if not measured:
        return None
    return Linked(measured[0][0].format(mean(gain for _, gain in measured), sign="+"), [run for run, _ in measured])


def _perplexity(runs: Iterable[Run]) -> Linked | None:
    """Mean perplexity of unrelated texts after training, of the runs that measured it."""
    measured = [(run, run.unrelated_perplexity) for run in runs if run.unrelated_perplexity is not None]
    if not measured:
        return None
    before, after = (mean(getattr(found, end) for _, found in measured) for end in ("before", "after"))
    return Linked(f"{after:.2f} ({after / before - 1:+.1%})", [run for run, _ in measured])


def searches(section: Section) -> Table:
    """Learning rates that were tried for each method on each task, and the one that the runs have."""
    rows = []
    for task in section.tasks:
        for method in section.methods:
            trials: list[Run] = sorted(_of(section.trials, task, method), key=lambda run: (run.learning_rate, run.seed))
            failed = [failure for failure in _of(section.failures, task, method) if failure.trial]
            if not trials and not failed:
                continue
            tried = [one.learning_rate for one in (*trials, *failed)]
            used = sorted({run.learning_rate for run in section.runs_of(task, method)})
            scored = [
                f"{rate:g}: {' and '.join(run.format(run.selection_value) for run in runs)}"
                for rate, runs in groupby(trials, key=lambda run: run.learning_rate)
            ]
            scored += [f"{failure.learning_rate:g}: {failure.status}" for failure in failed]
            edges = (min(tried), max(tried))
            rows.append([
                task, method, Linked(", ".join(scored), trials),
                ", ".join(f"{rate:g}{' (edge)' if rate in edges else ''}" for rate in used),
            ])  # fmt: skip
    note = (
        "All searches start with the same number of learning rates. In some experiments, a search continues while its "
        "best rate is the lowest or highest tried. Searches have seeds of their own. Scores are on the rows that "
        "select, one for each seed. Runs use the rate with the best mean score; the training loss breaks ties. (edge): "
        "the lowest or highest rate tried; a better one may lie beyond."
    )
    return Table("Search", note, ["task", "method", "learning rate: score on the rows that select", "used"], rows)


def _of(found: Iterable[_Found], task: str, method: str) -> list[_Found]:
    return [one for one in found if (one.task_name, one.method_name) == (task, method)]


def every_run(runs: Iterable[Run]) -> Table:
    """A row for each run."""
    rows = []
    for run in runs:
        settings = run.config.training
        rows.append([
            run.experiment or "", run.task_name, run.method_name, str(run.seed),
            Linked(run.format(run.value, 2), [run]),
            f"{run.learning_rate:g}", str(run.rows_per_step), f"{settings.epochs:g}",
            f"{run.rows.train:,}", f"{run.training.seconds:.0f}" if not run.resumed else "",
            "" if run.calibration is None else f"{run.calibration.seconds:.0f}",
            f"{run.megabytes:,.0f}", (run.environment.commit or "")[:10],
        ])  # fmt: skip
    header = ["experiment", "task", "method", "seed", "score", "learning rate", "rows a step", "epochs", "rows",
              "training, s", "calibration, s", "peak, MB", "commit"]  # fmt: skip
    return Table("Every run", "A score links to the run's details. A resumed run has no time.", header, rows)
