"""Pictures of a report, as SVG that goes into the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from ..figures.drawing import svg_text
from .results import Run, Section

_FORMS = "os^Dv<>Pp*X"  # eleven, and ten colours: a hundred and ten methods, also for those who do not see colours


@dataclass(frozen=True)
class Picture:
    """An SVG and what it shows, for those who do not see it."""

    title: str
    svg: str
    alt: str


def pareto(section: Section) -> list[Picture]:
    """Score against training time, and against memory: a panel a task, a point a run."""
    timed = tuple(run for run in section.runs if run.timed)
    return [
        _scatter(section, runs, title, label, of)
        for title, label, of, runs in (
            ("Score against training time", "training, s", lambda run: run.seconds, timed),
            ("Score against peak memory", "peak memory, MB", lambda run: run.megabytes, section.runs),
        )
        if runs
    ]


def _scatter(section: Section, runs: tuple[Run, ...], title: str, label: str, of: Callable[[Run], float]) -> Picture:
    methods = section.methods
    tasks = [task for task in section.tasks if any(run.task == task for run in runs)]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.set_visible(False)
    for panel, task in zip(figure.axes, tasks, strict=False):
        panel.set_visible(True)
        for number, method in enumerate(methods):
            points = [(of(run), run.score) for run in runs if (run.task, run.method) == (task, method)]
            if points:
                x, y = zip(*points, strict=True)
                colour, form = f"C{number % 10}", _FORMS[number % len(_FORMS)]
                panel.scatter(x, y, s=22, color=colour, marker=form, label=method, alpha=0.8)
        unit = next(run.unit for run in runs if run.task == task)
        panel.set(title=task, xlabel=label, ylabel="100 x score" if unit == "points" else unit)
        panel.grid(alpha=0.3)
    handles = {h.get_label(): h for panel in figure.axes for h in panel.collections}
    figure.legend(handles=[handles[name] for name in methods if name in handles], loc="outside lower center", ncols=4)
    best = []
    for task in tasks:
        own = sorted((run for run in runs if run.task == task), key=lambda run: run.score)
        word, top = ("highest", own[-1]) if own[0].higher_is_better else ("lowest", own[0])
        best.append(f"{task}: {word} {top.shown(top.score)} by {top.method} at {of(top):,.0f} ({label})")
    return Picture(title, svg_text(figure), f"{title}, one point a run. {'; '.join(best)}.")
