"""What the runs of an experiment say, in sentences."""

from __future__ import annotations

import math
from dataclasses import replace

from .results import Section
from .statistics import by_unit, cells, common_seeds, compare, mean_of_tasks


def verdict(section: Section) -> list[str]:
    """What the runs say: a sentence for each method that is compared, and one for what was not run."""
    baseline = section.baseline
    methods = [method for method in section.methods if any(run.method == method for run in section.runs)]
    others = [method for method in methods if method != baseline]
    if not methods:
        return ["No run has a score yet.", *_left(section)]
    if not section.scored:
        return [f"{len(section.runs)} runs of a few steps, for time and memory alone.", *_left(section)]
    if baseline not in methods or not others:
        runs = f"{len(section.runs)} run{'s' if len(section.runs) > 1 else ''}"
        return [f"{runs} of {', '.join(methods)}; there is nothing to compare with {baseline}."]
    parts = by_unit(section).values()
    return [
        *(_ranking(part, methods) for part in parts),
        *(
            compare(part.runs, method, baseline).words
            for part in parts
            for method in others
            if {method, baseline} <= {run.method for run in part.runs}
        ),
        *_left(section),
        *section.borrowed,
    ]


def _ranking(section: Section, methods: list[str]) -> str:
    """The methods that have run on all tasks, the best first; runs of one unit. Where there are none, on the tasks that
    all methods have run on that have run at all.
    """
    first = section.runs[0]
    means = {method: mean_of_tasks(section, method) for method in methods}
    found = sorted(
        ((mean, method) for method, mean in means.items() if not math.isnan(mean)), reverse=first.higher_is_better
    )
    if not found:
        table = cells(section.runs)
        shared = tuple(task for task in section.tasks if table.get(task, {}).keys() >= set(methods))
        words = f"No method has run on all of {', '.join(section.tasks)} yet"
        return f"{words}; {_ranking(replace(section, tasks=shared), methods)}" if shared else f"{words}."
    what = f"Mean of {len(section.tasks)} tasks" if len(section.tasks) > 1 else section.tasks[0]
    seeds = common_seeds(section)
    if len(seeds) == 1:
        what += ", one seed"
    lower = "" if first.higher_is_better else " (lower is better)"
    return f"{what}{lower}: {', '.join(f'{method} {first.shown(mean)}' for mean, method in found)}."


def _left(section: Section) -> list[str]:
    """What the experiment has and the runs have not, in a sentence: methods, and tasks of those that were run; and in
    another what has failed.
    """
    if not section.experiment:
        return []  # nobody has planned more
    missing = [method for method in section.methods if method not in section.tried]
    words = [", ".join(missing)] if missing else []
    failed: dict[str, list[str]] = {}
    for method in section.methods:
        own = [run for run in section.runs if run.method == method]
        failures = [f for f in section.failures if f.result["variant"] == method and not f.result.get("trial")]
        met = {run.task for run in own} | {failure.task for failure in failures}
        tasks = [task for task in section.tasks if task not in met]
        wanted = len(met) * len(section.seeds)
        if met and tasks:
            words.append(f"{method} on {', '.join(tasks)}")
        if met and len(own) + len(failures) < wanted:
            words.append(f"{wanted - len(own) - len(failures)} of the other {wanted} runs of {method}")
        for failure in failures:
            failed.setdefault(f"{method} {failure.result['status']}", []).append(failure.task)
    said = [f"Not run: {'; '.join(words)}."] if words else []
    if failed:
        all_of_them = [f"{what} on {', '.join(dict.fromkeys(tasks))}" for what, tasks in failed.items()]
        said.append(f"Failed: {'; '.join(all_of_them)}.")
    return said
