"""Pictures of a report, as SVG that goes into the page."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .compare import methods_of
from .results import Run


@dataclass(frozen=True)
class Picture:
    """An SVG and what it shows, for those who do not see it."""

    title: str
    svg: str
    alt: str


def pareto(runs: list[Run]) -> list[Picture]:
    """Score against training time, and against memory: a panel a task, a point a run."""
    return [
        _scatter(runs, "Score against training time", "training, s", lambda run: run.seconds),
        _scatter(runs, "Score against peak memory", "peak memory, MB", lambda run: run.megabytes),
    ]


def _scatter(runs: list[Run], title: str, label: str, of: Callable[[Run], float]) -> Picture:
    tasks, methods = list(dict.fromkeys(run.task for run in runs)), methods_of(runs)
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.set_visible(False)
    for panel, task in zip(figure.axes, tasks, strict=False):
        panel.set_visible(True)
        for colour, method in enumerate(methods):
            points = [(of(run), run.score) for run in runs if (run.task, run.method) == (task, method)]
            if points:
                x, y = zip(*points, strict=True)
                panel.scatter(x, y, s=22, color=f"C{colour}", label=method, alpha=0.8)
        panel.set(title=task, xlabel=label, ylabel="100 x score")
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    best = []
    for task in tasks:
        top = max((run for run in runs if run.task == task), key=lambda run: run.score)
        best.append(f"{task}: highest {top.score:.1f} by {top.method} at {of(top):,.0f} ({label})")
    return Picture(title, svg_text(figure), f"{title}, one point a run. {'; '.join(best)}.")


def svg_text(figure: Figure) -> str:
    """The figure as an `<svg>` element; equal figures give equal bytes, and words stay words."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "sparsegrad", "svg.fonttype": "none"}):  # the same runs give the same bytes
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
