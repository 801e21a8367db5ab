"""Tables of a report, as rows of text: the same for Markdown, CSV and the page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from .compare import by_unit, cells, compare, mean_of_tasks, methods_of
from .results import Run


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


def scores(runs: list[Run]) -> Table:
    """Tasks down, methods across."""
    table, methods = cells(runs), methods_of(runs)
    rows, behind = [], {}
    for number, (task, by) in enumerate(table.items()):
        first = next(iter(by.values())).runs[0]
        row = [f"{task}, {first.result['metric'].replace('_', ' ')}"]
        for column, method in enumerate(methods, 1):
            if method in by:
                behind[number, column] = by[method].runs
            row.append(f"{by[method]} ({len(by[method].runs)})" if method in by else "not run")
        rows.append(row)
    units = by_unit(runs)
    for unit, some in units.items():
        means = [mean_of_tasks(some, method) for method in methods]
        words = [some[0].shown(mean) if math.isfinite(mean) else "not all run" for mean in means]
        rows.append([f"mean of tasks, {unit}" if len(units) > 1 else "mean of tasks", *words])
    note = (
        "100 x score of the best evaluation of a run on the task's dev set: mean ± standard deviation over seeds "
        "(number of seeds)."
    )
    losses = [unit for unit in units if unit != "points"]
    if losses:
        note = f"{note} A {' or '.join(losses)} is shown as it is, and lower is better."
    return Table("Scores", note, ["task", *methods], rows, behind)


def costs(runs: list[Run]) -> Table:
    """What a method takes: methods down."""
    rows, behind = [], {}
    for number, method in enumerate(methods_of(runs)):
        own = [run for run in runs if run.method == method]
        behind[number, 0] = tuple(own)
        speeds = [run.result["steps"] / run.seconds for run in own if not run.result.get("resumed")]
        calibrations = [run.calibration_seconds / run.seconds for run in own if run.calibration_seconds is not None]
        rows.append([
            method,
            ", ".join(f"{n:,}" for n in sorted({run.entries for run in own})),
            ", ".join(f"{rate:g}" for rate in sorted({run.result["learning_rate"] for run in own})),
            f"{sum(speeds) / len(speeds):.2f}" if speeds else "",
            f"{100 * sum(calibrations) / len(calibrations):.0f} %" if calibrations else "none",
            f"{max(run.megabytes for run in own):,.0f}",
            f"{max(run.result['weights_bytes'] for run in own) / 1e6:.1f}",
        ])  # fmt: skip
    header = [
        "method",
        "trained entries",
        "learning rate",
        "steps/s",
        "calibration, to training",
        "peak, MB",
        "saved, MB",
    ]
    note = (
        "Steps per second and memory are of runs that may have shared the machine with others: see the performance "
        "page for measurements. Peak: of the whole process."
    )
    return Table("Costs", note, header, rows, behind)


def comparisons(runs: list[Run], baseline: str) -> Table:
    """Every method against one, paired by task and seed."""
    rows, units = [], by_unit(runs)
    for unit, some in units.items():
        shown = partial(some[0].shown, digits=2, sign="+")
        for method in methods_of(runs):
            if method != baseline:
                found = compare(some, method, baseline)
                known = not math.isnan(found.p)
                rows.append([
                    f"{method}, {unit}" if unit != "points" else method, str(found.pairs),
                    shown(found.difference) if found.pairs else "",
                    f"{shown(found.low)} to {shown(found.high)}" if known else "", f"{found.p:.2g}" if known else "",
                    f"{found.ahead} of {found.pairs}",
                ])  # fmt: skip
    header = ["method", "pairs", f"difference from {baseline}", "95 % interval", "p (paired t-test)", "ahead"]
    note = "Pairs of runs with the same task and seed; points are hundredths of a score."
    if set(units) != {"points"}:
        note = f"{note} A difference in loss is below 0 where the method is ahead."
    return Table(f"Against {baseline}", note, header, rows, {})


def every_run(runs: list[Run]) -> Table:
    """One row a run."""
    rows, behind = [], {}
    for number, run in enumerate(runs):
        behind[number, 3] = (run,)
        training = run.result["config"]["training"]
        rows.append([
            run.task, run.method, str(run.result["seed"]), run.shown(run.score, 2), f"{run.result['learning_rate']:g}",
            str(training["batch_size"]), f"{training['epochs']:g}", f"{run.result['rows']['train']:,}",
            f"{run.seconds:.0f}", "" if run.calibration_seconds is None else f"{run.calibration_seconds:.0f}",
            f"{run.megabytes:,.0f}", str(run.result["environment"].get("commit") or "")[:10],
        ])  # fmt: skip
    header = ["task", "method", "seed", "score", "learning rate", "batch", "epochs", "rows", "training, s",
              "calibration, s", "peak, MB", "commit"]  # fmt: skip
    return Table("Every run", "A score leads to all that is known of its run.", header, rows, behind)
