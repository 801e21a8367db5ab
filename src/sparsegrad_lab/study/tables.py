"""Tables of a report, as rows of text: the same for Markdown, CSV and the page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from .results import Failure, Run, Section
from .statistics import at_the_end, by_unit, cells, compare, mean_of_tasks


@dataclass(frozen=True)
class Table:
    """Header and rows; `runs` are the runs behind a cell, by (row, column)."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    runs: Mapping[tuple[int, int], tuple[Run, ...]]

    def markdown(self) -> str:
        """A pipe table."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{body}\n\n{self.note}\n"

    def csv(self) -> str:
        """Comma-separated, with a header."""
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.rows])
        return buffer.getvalue()


def tables_of(section: Section) -> dict[str, Table]:
    """The tables of an experiment, by the names of their files."""
    found = {"scores": scores(section)} if section.scored else {}
    if section.scored and section.baseline in section.methods and len(section.methods) > 1:
        found["comparison"] = comparisons(section)
    if section.trials:
        found["search"] = searches(section)
    if section.runs:
        found["costs"] = costs(section)
    if section.runs and len(section.tasks) > 1:
        found["speed"] = costs_by_task(section)
    return found


def scores(section: Section) -> Table:
    """Tasks down, methods across; what was not run or failed is named as such."""
    table = cells(section.runs)
    rows: list[list[str]] = []
    behind: dict[tuple[int, int], tuple[Run, ...]] = {}
    for number, task in enumerate(section.tasks):
        by = table.get(task, {})
        first = next((cell.runs[0] for cell in by.values()), None)
        row = [task if first is None else f"{task}, {first.result['metric'].replace('_', ' ')}"]
        for column, method in enumerate(section.methods, 1):
            failed = [f for f in section.failures if _is(f, task, method)]
            said = ", ".join(f"{failure.result['status']}: seed {failure.result['seed']}" for failure in failed)
            if method in by:
                behind[number, column] = by[method].runs
                row.append(f"{by[method]} ({len(by[method].runs)}){f'; {said}' if said else ''}")
            else:
                row.append(said or "not run")
        rows.append(row)
    units = by_unit(section)
    for unit, part in (units or {"points": section}).items():
        means = [mean_of_tasks(part, method) for method in section.methods]
        words = [part.runs[0].shown(mean) if math.isfinite(mean) else "not all run" for mean in means]
        rows.append([f"mean of tasks, {unit}" if len(units) > 1 else "mean of tasks", *words])
        last = [mean_of_tasks(at_the_end(part), method) for method in section.methods]
        at_last = [part.runs[0].shown(mean) if math.isfinite(mean) else "not all run" for mean in last]
        if at_last != words:
            rows.append([f"... at the last evaluation{f', {unit}' if len(units) > 1 else ''}", *at_last])
    note = (
        "100 x score of the best evaluation of a run on the task's dev set: mean ± standard deviation over seeds "
        "(number of seeds). The mean of tasks is over the seeds that all methods of the row have run."
    )
    losses = [unit for unit in units if unit != "points"]
    if losses:
        note = f"{note} A {' or '.join(losses)} is shown as it is, and lower is better."
    return Table("Scores", note, ["task", *section.methods], rows, behind)


def _is(failure: Failure, task: str, method: str, trial: bool = False) -> bool:
    found = failure.result
    where = (failure.task, found["variant"], bool(found.get("trial")))
    return where == (task, method, trial)


def costs(section: Section) -> Table:
    """What a method takes: methods down."""
    rows: list[list[str]] = []
    behind: dict[tuple[int, int], tuple[Run, ...]] = {}
    common = set.intersection(*(
        {run.task for run in section.runs if run.timed and run.method == method}
        for method in {run.method for run in section.runs}
    ))  # fmt: skip
    for method in section.methods:
        own = [run for run in section.runs if run.method == method]
        if not own:
            continue
        behind[len(rows), 0] = tuple(own)
        timed = [run for run in own if run.timed]
        calibrations = [run.calibration_seconds / run.seconds for run in timed if run.calibration_seconds is not None]
        touched = sorted({run.result["trained_entries"].get("touched", run.entries) for run in own})
        rows.append([
            method,
            ", ".join(f"{n:,}" for n in sorted({run.entries for run in own})),
            f"{touched[0]:,}" if len(touched) == 1 else f"{touched[0]:,} to {touched[-1]:,}",
            _speed([run for run in timed if run.task in common]),
            f"{100 * sum(calibrations) / len(calibrations):.0f} %" if calibrations else "none",
            f"{max(run.megabytes for run in own):,.0f}",
            f"{max(run.result['weights_bytes'] for run in own) / 1e6:.1f}",
        ])  # fmt: skip
    header = ["method", "trained entries", "touched", "steps/s", "calibration, to training", "peak, MB", "saved, MB"]
    note = (
        "Trained entries: of the MLP layers; touched: those that are not zero in the end, for methods that select all "
        "that a step has ever moved (new bases in mid-training spread them over all). Steps per second, of the "
        "tasks that all methods have run, with evaluations and checkpoints; they and memory are of runs that may have "
        "shared the machine with others: see the performance page for measurements. Peak: of the whole process. Saved: "
        "with the head."
    )
    return Table("Costs", note, header, rows, behind)


def _speed(runs: Sequence[Run]) -> str:
    """Steps per second; empty where no run has a time."""
    return f"{sum(run.result['steps'] for run in runs) / sum(run.seconds for run in runs):.2f}" if runs else ""


def costs_by_task(section: Section) -> Table:
    """Steps per second and peak memory: tasks down, methods across (the paper's tables 3, 7 and 8)."""
    methods = [method for method in section.methods if method in section.tried]
    rows: list[list[str]] = []
    behind: dict[tuple[int, int], tuple[Run, ...]] = {}
    for task in section.tasks:
        row = [task]
        for column, method in enumerate(methods, 1):
            own = tuple(run for run in section.runs if (run.task, run.method) == (task, method))
            timed = tuple(run for run in own if run.timed)
            failed = {failure.result["status"] for failure in section.failures if _is(failure, task, method)}
            if own:
                behind[len(rows), column] = own
                row.append(f"{_speed(timed) or 'resumed'} / {max(run.megabytes for run in own):,.0f}")
            else:
                row.append(", ".join(sorted(failed)) or "not run")
        rows.append(row)
    note = (
        "Steps per second, with evaluations and checkpoints (a run that was resumed has no time) / most memory of "
        "the process in MB. A step is a batch; how long its sequences are is the task's doing."
    )
    paper = section.paper or {}
    if published := paper.get("costs"):
        found = ["{:g} / {:,}".format(*published[method]) if method in published else "" for method in methods]
        rows.append([f"in the paper ({paper['columns'][0]})", *found])
        note += f" The paper's: {paper['source']}."
    return Table("Speed and memory by task", note, ["task", *methods], rows, behind)


def comparisons(section: Section) -> Table:
    """Every method against the baseline, paired by task and seed, beside the published difference."""
    baseline, units = section.baseline, by_unit(section)
    rows = []
    paper = section.paper or {"scores": {}, "columns": [], "source": ""}
    published = paper["scores"] if baseline in paper.get("scores", {}) else {}
    for unit, part in units.items():
        shown = partial(part.runs[0].shown, digits=2, sign="+")
        for method in section.methods:
            if method == baseline:
                continue
            found = compare(part.runs, method, baseline)
            known = not math.isnan(found.p)
            theirs = [a - b for a, b in zip(published.get(method, ()), published.get(baseline, ()), strict=False)]
            rows.append([
                f"{method}, {unit}" if unit != "points" else method, str(found.pairs),
                shown(found.difference) if found.pairs else "",
                f"{shown(found.low)} to {shown(found.high)}" if known else "", f"{found.p:.2g}" if known else "",
                *([f"{found.p_tasks:.2g}" if found.tasks > 1 else ""] if len(section.tasks) > 1 else []),
                f"{found.ahead} of {found.pairs}",
                *([", ".join(map(partial(shown, digits=1 if unit == "points" else 2), theirs))] if published else []),
            ])  # fmt: skip
    over = ["p over tasks"] if len(section.tasks) > 1 else []
    header = ["method", "pairs", f"difference from {baseline}", "95 % interval", "p (paired t-test)", *over, "ahead"]
    note = "Pairs of runs with the same task and seed; points are hundredths of a score."
    if over:
        note += (
            " The runs of a task share its rows and a learning rate; p over tasks is that of the same test over the "
            "means of the tasks."
        )
    if len(section.methods) > 2:
        note += " Each row is a test of its own, and of many some are below 0.05 by chance."
    if set(units) - {"points"}:
        note = f"{note} A difference in loss is below 0 where the method is ahead."
    if published:
        header.append(f"in the paper ({', '.join(paper['columns'])})")
        note += f" The paper's differences: {paper['source']}."
    return Table(f"Against {baseline}", note, header, rows, {})


def searches(section: Section) -> Table:
    """Which learning rates were tried for each method on each task, and which one won."""
    by = cells(section.trials)
    rows: list[list[str]] = []
    behind: dict[tuple[int, int], tuple[Run, ...]] = {}
    for task in section.tasks:
        for method in section.methods:
            failed = [f for f in section.failures if _is(f, task, method, trial=True)]
            if method not in by.get(task, {}) and not failed:
                continue
            found = by[task][method].runs if method in by.get(task, {}) else ()
            trials = sorted(found, key=lambda run: float(run.result["learning_rate"]))
            behind[len(rows), 2] = tuple(trials)
            tried = [float(one.result["learning_rate"]) for some in (trials, failed) for one in some]
            taken = sorted({run.result["learning_rate"] for run in section.runs
                            if (run.task, run.method) == (task, method)})  # fmt: skip
            rows.append([
                task, method,
                ", ".join(
                    [f"{run.result['learning_rate']:g}: {run.shown(run.score)}" for run in trials]
                    + [f"{f.result['learning_rate']:g}: {f.result['status']}" for f in failed]
                ),
                ", ".join(f"{rate:g}{' (edge)' if rate in (min(tried), max(tried)) else ''}" for rate in taken),
            ])  # fmt: skip
    note = (
        "Each method gets the same number of trials on a task, at a seed that does not count. The runs take the rate "
        "with the best score on the dev set, on which they are scored as well; of equal ones that with the lowest "
        "training loss. At an edge of the rates that were tried there may be a better one beyond it."
    )
    return Table("Search", note, ["task", "method", "learning rate: score", "taken"], rows, behind)


def every_run(runs: Iterable[Run]) -> Table:
    """One row a run."""
    rows: list[list[str]] = []
    behind: dict[tuple[int, int], tuple[Run, ...]] = {}
    for number, run in enumerate(runs):
        behind[number, 4] = (run,)
        training = run.result["config"]["training"]
        rows.append([
            run.result.get("experiment", ""), run.task, run.method, str(run.result["seed"]), run.shown(run.score, 2),
            f"{run.result['learning_rate']:g}", str(training["batch_size"]), f"{training['epochs']:g}",
            f"{run.result['rows']['train']:,}", f"{run.seconds:.0f}" if run.timed else "",
            "" if run.calibration_seconds is None else f"{run.calibration_seconds:.0f}",
            f"{run.megabytes:,.0f}", str(run.result["environment"].get("commit") or "")[:10],
        ])  # fmt: skip
    header = ["experiment", "task", "method", "seed", "score", "learning rate", "batch", "epochs", "rows",
              "training, s", "calibration, s", "peak, MB", "commit"]  # fmt: skip
    return Table(
        "Every run",
        "A score leads to all that is known of its run; one that was resumed has no time of all its steps.",
        header,
        rows,
        behind,
    )
