"""The outcome of a section in sentences."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from itertools import product

from .sections import Section
from .statistics import by_unit, common_seeds, compare_all, means_of_tasks, score_table


def verdict(section: Section) -> list[str]:
    """Ranking of the methods, a sentence for each comparison with the baseline, and what is missing or failed."""
    baseline = section.baseline
    with_runs = {run.method_name for run in section.runs}
    methods = [method for method in section.methods if method in with_runs]
    if not methods:
        return ["No run has a score yet.", *_missing(section), *section.remarks]
    if not section.scored:
        return [
            f"{len(section.runs)} short runs that measure time and memory only.",
            *_missing(section),
            *section.remarks,
        ]
    if baseline not in methods or len(methods) == 1:
        runs = f"{len(section.runs)} run{'s' if len(section.runs) > 1 else ''}"
        several = [method for method in methods if method.startswith(f"{baseline} (")]
        advice = f": it has runs with several settings. Choose one: --baseline '{several[0]}'" if several else ""
        impossible = f"{runs} of {', '.join(methods)}; no comparison with {baseline} is possible{advice}."
        return [impossible, *_missing(section), *section.remarks]
    parts = list(by_unit(section).values())
    comparisons: list[str] = []
    for part in parts:
        here = {run.method_name for run in part.runs}
        others = [method for method in methods if method in here - {baseline}] if baseline in here else []
        comparisons += map(str, compare_all(part.runs, others, baseline))
    return [*(_ranking(part, methods) for part in parts), *comparisons, *_missing(section), *section.remarks]


def _ranking(section: Section, methods: list[str]) -> str:
    """Methods by their mean over all tasks, the best first; runs of one unit.

    If no method has run on all tasks, the tasks that all methods have run on.
    """
    first, planned = section.runs[0], len(section.tasks)
    ranked = _ranked(section, methods)
    if not ranked:
        scores = score_table(section.runs).reindex(columns=methods).groupby(level="task").count().min(axis=1)
        section = replace(section, tasks=tuple(task for task in section.tasks if scores.get(task, 0) > 0))
        if not section.tasks:
            return "No task has runs of all methods yet."
        ranked = _ranked(section, methods)
    count = len(section.tasks)
    of = f" of {planned}" if count < planned else ""
    what = f"Mean of {count}{of} tasks" if count > 1 else f"{section.tasks[0]}{f', 1{of} tasks' if of else ''}"
    common = common_seeds(section)
    some = bool(common) and any(run.seed not in common for run in section.runs if run.task_name in section.tasks)
    seeds = ", one seed" if len(common) == 1 else f", mean over {len(common)} common seeds" if some else ""
    lower = "" if first.higher_is_better else " (lower is better)"
    without = [] if section.experiment else _left_out(section, methods)  # of an experiment, `_missing` names them
    means = ", ".join(f"{method} {first.format(mean)}" for mean, method in ranked)
    return f"{what}{seeds}{lower}: {means}{'; without ' if without else ''}{', '.join(without)}."


def _left_out(section: Section, methods: list[str]) -> list[str]:
    """Methods that have not run on all tasks of the section, each with the tasks that it lacks."""
    lacks = {method: [task for task in section.tasks if not section.runs_of(task, method)] for method in methods}
    return [f"{method} (not on {', '.join(tasks)})" for method, tasks in lacks.items() if tasks]


def _ranked(section: Section, methods: list[str]) -> list[tuple[float, str]]:
    """(mean, method) of the methods that have run on all tasks of the section, the best first."""
    means = means_of_tasks(section)
    found = [(means[method], method) for method in methods if not math.isnan(means[method])]
    return sorted(found, reverse=section.runs[0].higher_is_better)


def _missing(section: Section) -> list[str]:
    """What the experiment plans and nobody has run, in a sentence; what has failed, in another."""
    if not section.experiment:
        return []  # runs that no experiment has planned
    not_run = [method for method in section.methods if method not in section.attempted]
    words = [", ".join(not_run)] if not_run else []
    failed = defaultdict(list)
    for method in section.methods:
        runs = section.runs_of(method=method)
        failures = [failure for failure in section.failures if failure.method_name == method and not failure.trial]
        attempted = {run.task_name for run in runs} | {failure.task_name for failure in failures}
        tasks = [task for task in section.tasks if task not in attempted]
        planned = set(product(attempted, section.seeds.get(method, ())))
        ended = [*((run.task_name, run.seed) for run in runs), *((one.task_name, one.seed) for one in failures)]
        missing = len(planned.difference(ended))
        if attempted and tasks:
            words.append(f"{method} on {', '.join(tasks)}")
        if missing:
            where = f" on {', '.join(task for task in section.tasks if task in attempted)}" if tasks else ""
            words.append(f"{missing} of {len(planned)} planned runs of {method}{where}")
        for failure in failures:
            failed[f"{method} {failure.status}"].append(failure.task_name)
    sentences = [f"Not run: {'; '.join(words)}."] if words else []
    if failed:
        named = [f"{what} on {', '.join(dict.fromkeys(tasks))}" for what, tasks in failed.items()]
        sentences.append(f"Failed: {'; '.join(named)}.")
    return sentences
