"""Scatter plots of a report, as SVG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..figures.drawing import svg_text
from .runs import Run
from .sections import Section

_MARKERS = "os^Dv<>Pp*X"
"Eleven, with ten colours: 110 methods look different, also without colours."


@dataclass(frozen=True)
class Plot:
    """An SVG, and a description for those who cannot see it."""

    title: str
    svg: str
    description: str


def scatter_plots(section: Section) -> list[Plot]:
    """Score against training time and against memory: a panel for each task, a point for each run."""
    if not section.scored:
        return []
    timed = tuple(run for run in section.runs if not run.resumed)
    plots = [
        ("Score against training time", "training, s", timed, lambda run: run.training.seconds),
        ("Score against peak memory", "peak memory, MB", section.runs, lambda run: run.megabytes),
    ]
    return [_scatter(section, title, label, runs, cost) for title, label, runs, cost in plots if runs]


def _scatter(section: Section, title: str, label: str, runs: tuple[Run, ...], cost: Callable[[Run], float]) -> Plot:
    tasks = [task for task in section.tasks if any(run.task_name == task for run in runs)]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    best = []
    with rc_context({"text.parse_math": False}):  # names are shown as they are, also with a $
        figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel in panels[len(tasks) :]:
            panel.set_visible(False)
        handles = {}
        for panel, task in zip(panels, tasks, strict=False):
            own = sorted((run for run in runs if run.task_name == task), key=lambda run: run.value)
            for number, method in enumerate(section.methods):
                points = [(cost(run), run.value) for run in own if run.method_name == method]
                if points:
                    x, y = zip(*points, strict=True)
                    colour, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
                    handles[method] = panel.scatter(x, y, s=22, color=colour, marker=marker, label=method, alpha=0.8)
            unit = own[0].unit
            panel.set(title=task, xlabel=label, ylabel="100 x score" if unit == "points" else unit)
            panel.grid(alpha=0.3)
            word, top = ("highest", own[-1]) if own[0].higher_is_better else ("lowest", own[0])
            best.append(f"{task}: {word} {top.format(top.value)} by {top.method_name} at {cost(top):,.0f} ({label})")
        names = [method for method in section.methods if method in handles]
        figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=4)
        return Plot(title, svg_text(figure), f"{title}, one point a run. {'; '.join(best)}.")
