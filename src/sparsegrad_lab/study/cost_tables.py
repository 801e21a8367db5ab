"""Tables of time, memory and size."""

from __future__ import annotations

from collections.abc import Sequence

from .runs import Run
from .sections import Section
from .table import Linked, Table


def costs(section: Section) -> Table:
    """Entries, speed, memory and bytes on disk: a row for each method."""
    methods = {run.method_name for run in section.runs}
    timed_tasks = [{run.task_name for run in section.runs_of(method=method) if not run.resumed} for method in methods]
    common = set.intersection(*filter(None, timed_tasks)) if any(timed_tasks) else set()  # all runs may be resumed ones
    rows = []
    for method in section.methods:
        runs = section.runs_of(method=method)
        if not runs:
            continue
        timed = [run for run in runs if not run.resumed]
        shares = [run.calibration.seconds / run.training.seconds for run in timed if run.calibration is not None]
        trained = sorted({run.trained_entries.adapter for run in runs})
        entries = [run.trained_entries for run in runs]
        touched = sorted({one.adapter if one.touched is None else one.touched for one in entries})
        rows.append([
            Linked(method, runs),
            ", ".join(f"{count:,}" for count in trained),
            _range([f"{count:,}" for count in touched]),
            _steps_per_second([run for run in timed if run.task_name in common]),
            f"{100 * sum(shares) / len(shares):.0f} %" if shares else "none",
            f"{max(run.megabytes for run in runs):,.0f}",
            _range(sorted({f"{run.weights_bytes / 1e6:.1f}" for run in runs}, key=float)),
        ])  # fmt: skip
    header = ["method", "trained entries", "touched", "steps/s", "calibration ÷ training", "peak, MB", "saved, MB"]
    note = (
        "Trained entries: those of the method, without the head. Touched: those that are not zero after training; a"
        " core starts at zero, so these are the entries that a step has changed (all of them where the bases were "
        "made again during training). Steps per second: over the tasks that all methods have run, with evaluations "
        "and checkpoints. Calibration ÷ training: ratio of the two times. Peak: the largest memory of a run's "
        "process, during calibration or training. Other processes may have shared the machine; the performance page"
        " has measurements. Saved: adapter or model, with the head."
    )
    return Table("Costs", note, header, rows)


def costs_by_task(section: Section) -> Table:
    """Steps per second and peak memory: a row for each task, a column for each method (paper, Tables 3, 7 and 8)."""
    methods = [method for method in section.methods if method in section.attempted]
    rows = []
    for task in section.tasks:
        row = [task]
        for method in methods:
            runs = section.runs_of(task, method)
            failed = {failure.status for failure in section.failures_of(task, method)}
            if runs:
                speed = _steps_per_second([run for run in runs if not run.resumed]) or "resumed"
                row.append(Linked(f"{speed} / {max(run.megabytes for run in runs):,.0f}", runs))
            else:
                row.append(", ".join(sorted(failed)) or "not run")
        rows.append(row)
    note = (
        "Steps per second, with evaluations and checkpoints / peak memory of the process in MB. A resumed run has no "
        "time. A step is a batch, whose sequences are longer on some tasks."
    )
    paper = section.paper or {}
    if published := paper.get("costs"):
        cells = ["{:g} / {:,}".format(*published[method]) if method in published else "" for method in methods]
        rows.append([f"in the paper ({paper['columns'][0]})", *cells])
        note += f" The paper's: {paper['source']}."
    return Table("Speed and memory by task", note, ["task", *methods], rows)


def _steps_per_second(runs: Sequence[Run]) -> str:
    return f"{sum(run.steps for run in runs) / sum(run.training.seconds for run in runs):.2f}" if runs else ""


def _range(values: Sequence[str]) -> str:
    """The only one of some sorted values, or the first and the last."""
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
