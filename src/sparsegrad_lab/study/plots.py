"""Plots of a report, as SVG: differences to the baseline, differences against costs, learning curves, and every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from ..figures.drawing import svg_text
from .runs import Run
from .sections import Section
from .statistics import Comparison, by_unit, compare_all

_MARKERS = "os^Dv<>Pp*X"
"Eleven, with ten colours: 110 methods look different, also without colours."
_TICKS = 4
_DARK = """<style>@media (prefers-color-scheme: dark) {
text, [style*="fill: #000000"] { fill: #e6e6e6 !important; }
[style*="stroke: #000000"] { stroke: #b0b0b0 !important; }
}</style>"""
"An image follows the colours of the system by itself. The rule overrides matplotlib's black."


@dataclass(frozen=True)
class Plot:
    """An SVG with a caption, and a description with numbers for those who cannot see it."""

    title: str
    svg: str
    caption: str
    description: str


def difference_plots(section: Section) -> list[Plot]:
    """Each method's mean difference to the baseline with its 95 % interval, and a dot for each task; a plot a unit."""
    plots = []
    for unit, part, found in _comparisons(section):
        with _drawing(5.2, 1.1 + 0.4 * _lines(one.method for one in found)) as (figure, [axes]):
            for place, comparison in enumerate(found):
                dots = comparison.by_task
                axes.plot(dots, [place] * len(dots), "o", color="C0", alpha=0.45, markersize=5, markeredgewidth=0)
                if not math.isnan(comparison.low):
                    axes.plot([comparison.low, comparison.high], [place, place], color="C0", linewidth=2.5)
                axes.plot(comparison.difference, place, "D", color="C0", markersize=8)
            axes.axvline(0, color="#000000", linewidth=0.9)
            axes.set_yticks(range(len(found)), [_wrapped(comparison.method) for comparison in found])
            axes.set_ylim(len(found) - 0.5, -0.5)
            axes.set_xlabel(f"difference, {unit} ({'right' if part.runs[0].higher_is_better else 'left'} is better)")
            svg = _svg(figure)
        caption = (
            "Diamond: mean over pairs of runs with the same task and seed. Bar: its 95 % interval. Dots: the same mean "
            "for each task."
        )
        description = f"{caption} {'; '.join(f'{one.method} {_difference(one)}' for one in found)}."
        plots.append(Plot(f"Difference to {section.baseline}", svg, caption, description))
    return plots


def cost_plots(section: Section) -> list[Plot]:
    """Each method's mean difference to the baseline against its costs, in one picture for each unit."""
    plots = []
    for unit, part, found in _comparisons(section):
        points = {one.method: one.difference for one in found} | {section.baseline: 0.0}
        panels = {
            f"training time ÷ {section.baseline}'s": _ratios(part, attrgetter("training.seconds"), timed=True),
            f"peak memory ÷ {section.baseline}'s": _ratios(part, attrgetter("megabytes")),
            f"saved bytes ÷ {section.baseline}'s": _ratios(part, lambda run: float(run.weights_bytes)),
            "calibration ÷ training time": _calibration_shares(part),
        }
        panels = {
            cost: shown
            for cost, values in panels.items()
            if len(shown := {method: value for method, value in values.items() if method in points}) > 1
        }
        if not panels:
            continue
        methods = [method for method in section.methods if any(method in values for values in panels.values())]
        with _drawing(6.4, 2.5 * -(-len(panels) // 2) + 0.3 + 0.2 * -(-_lines(methods) // 3), len(panels)) as (
            figure,
            axes,
        ):
            lines: dict[str, Any] = {}
            for panel, (cost, values) in zip(axes, panels.items(), strict=True):
                lines |= _draw(panel, section, {method: [(value, points[method])] for method, value in values.items()})
                panel.axhline(0, color="#000000", linewidth=0.7, alpha=0.5)
                panel.set_xlabel(fill(cost, 36))
                _show_at_least(panel, 0.5 if unit == "points" else 0.005)
                if "bytes" in cost:
                    panel.set_xscale("log")
                    wide = max(values.values()) > 50 * min(values.values())
                    panel.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
                    panel.xaxis.set_major_formatter("{x:g}")
                    panel.xaxis.set_minor_formatter("")
                else:
                    panel.xaxis.set_major_locator(MaxNLocator(_TICKS))
            for panel in axes[::2]:
                panel.set_ylabel(f"difference, {unit}")
            _add_legend(figure, {method: lines[method] for method in methods}, 3)
            svg = _svg(figure)
        words = "; ".join(
            f"{cost}: "
            + ", ".join(f"{method} {points[method]:+.3g} at {value:.2f}" for method, value in values.items())
            for cost, values in panels.items()
        )
        better = "Up" if part.runs[0].higher_is_better else "Down"
        caption = f"A point for each method. {better} and left is better."
        plots.append(Plot("Score against costs", svg, caption, f"{caption} {words}."))
    return plots


def forgetting_plots(section: Section) -> list[Plot]:
    """Each method's gain against what it forgot: a plot for each task whose runs have measured both."""
    plots = []
    for task in section.tasks:
        points = {}
        for method in section.methods:
            pairs = [
                (found.after / found.before - 1, run.gain)
                for run in section.runs_of(task, method)
                if (found := run.unrelated_perplexity) is not None and run.gain is not None
            ]
            if pairs:
                points[method] = tuple(sum(values) / len(values) for values in zip(*pairs, strict=True))
        if not points:
            continue
        with _drawing(4.4, 3.0 + 0.2 * -(-_lines(points) // 2)) as (figure, [axes]):
            lines = _draw(axes, section, {method: [(100 * rise, gain)] for method, (rise, gain) in points.items()})
            axes.axvline(0, color="#000000", linewidth=0.7, alpha=0.5)
            axes.set_xlabel("unrelated texts: change of perplexity, %")
            unit = section.runs_of(task)[0].unit
            axes.set_ylabel(f"gain, {unit}")
            _show_at_least(axes, 0.5 if unit == "points" else 0.005)
            _add_legend(figure, lines, 2)
            svg = _svg(figure)
        words = "; ".join(f"{method} {gain:+.3g} at {rise:+.1%}" for method, (rise, gain) in points.items())
        caption = "A point for each method, the mean of its runs. Up and left is better."
        plots.append(Plot(f"Gain against forgetting, {task}", svg, caption, f"{caption} {words}."))
    return plots


def curve_plots(section: Section) -> list[Plot]:
    """Each method's evaluations during training, the mean over its runs: a plot for each task with several of them."""
    if not section.scored:
        return []
    plots = []
    for task in section.tasks:
        curves = {method: _curve(section.runs_of(task, method)) for method in section.methods}
        curves = {method: points for method, points in curves.items() if len(points) > 1}
        if not curves:
            continue
        run = section.runs_of(task)[0]
        with _drawing(4.2, 3.0 + 0.2 * -(-_lines(curves) // 2)) as (figure, [axes]):
            lines = _draw(axes, section, curves, linestyle="-")
            axes.set(xlabel="step", ylabel="100 x score" if run.unit == "points" else run.unit)
            axes.xaxis.set_major_locator(MaxNLocator(_TICKS, integer=True))
            _add_legend(figure, lines, 2)
            svg = _svg(figure)
        words = "; ".join(
            f"{method} {run.format(points[0][1])} at step {points[0][0]:,.0f}, {run.format(points[-1][1])} at step "
            f"{points[-1][0]:,.0f}"
            for method, points in curves.items()
        )
        caption = "Evaluations during training, on the rows that select the checkpoint. Mean of a method's runs."
        plots.append(Plot(f"Learning curves, {task}", svg, caption, f"{caption} {words}."))
    return plots


def _curve(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Step and mean value of the evaluations that all of some runs have."""
    found = [
        {
            step: 100 * value if run.higher_is_better else value
            for entry in run.evaluations
            if (step := entry.get("step")) is not None and (value := entry.get(run.metric)) is not None
        }
        for run in runs
    ]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    return [(step, sum(values[step] for values in found) / len(found)) for step in steps]


def run_plots(section: Section) -> list[Plot]:
    """Score of each run against its training time and its memory: two plots for each task."""
    if not section.scored:
        return []
    timed = tuple(run for run in section.runs if not run.resumed)
    costs: list[tuple[str, tuple[Run, ...], Callable[[Run], float]]] = [
        ("training, s", timed, attrgetter("training.seconds")),
        ("peak memory, MB", section.runs, attrgetter("megabytes")),
    ]
    plots = []
    for task in section.tasks:
        for label, runs, cost in costs:
            own = sorted((run for run in runs if run.task_name == task), key=lambda run: run.value)
            if own:
                plots.append(_run_plot(section, task, label, own, cost))
    return plots


def _run_plot(section: Section, task: str, label: str, runs: list[Run], cost: Callable[[Run], float]) -> Plot:
    present = [method for method in section.methods if any(run.method_name == method for run in runs)]
    with _drawing(4.2, 3.0 + 0.2 * -(-_lines(present) // 2)) as (figure, [axes]):
        points = {name: [(cost(run), run.value) for run in runs if run.method_name == name] for name in present}
        lines = _draw(axes, section, points, alpha=0.85)
        unit = runs[0].unit
        axes.set(xlabel=label, ylabel="100 x score" if unit == "points" else unit)
        axes.xaxis.set_major_locator(MaxNLocator(_TICKS))
        _add_legend(figure, lines, 2)
        svg = _svg(figure)
    word, top = ("highest", runs[-1]) if runs[0].higher_is_better else ("lowest", runs[0])
    description = f"{task}: {word} {top.format(top.value)} by {top.method_name} at {cost(top):,.0f} ({label})."
    return Plot(task, svg, "A point for each run.", description)


def _comparisons(section: Section) -> Iterator[tuple[str, Section, list[Comparison]]]:
    """The parts of a section by unit, each with its methods' comparisons with the baseline."""
    if not section.scored:
        return
    for unit, part in by_unit(section).items():
        others = [method for method in section.methods if method != section.baseline]
        found = [one for one in compare_all(part.runs, others, section.baseline) if one.pairs]
        if found:
            yield unit, part, found


def _difference(comparison: Comparison) -> str:
    text = f"{comparison.difference:+.3g}"
    return text if math.isnan(comparison.low) else f"{text} ({comparison.low:+.3g} to {comparison.high:+.3g})"


def _ratios(section: Section, cost: Callable[[Run], float], timed: bool = False) -> dict[str, float]:
    """Method -> geometric mean of its cost divided by the baseline's, over pairs of runs with equal task and seed."""
    costs: dict[tuple[str, str, int], float] = {
        (run.method_name, run.task_name, run.seed): cost(run)
        for run in section.runs
        if cost(run) > 0 and not (timed and run.resumed)
    }
    ratios = {}
    for method in section.methods:
        logs = [
            math.log(value / costs[section.baseline, task, seed])
            for (name, task, seed), value in costs.items()
            if name == method and (section.baseline, task, seed) in costs
        ]
        if logs:
            ratios[method] = math.exp(sum(logs) / len(logs))
    return ratios


def _calibration_shares(section: Section) -> dict[str, float]:
    """Method -> mean time of its calibration divided by that of its training; 0 for methods without one."""
    shares: dict[str, list[float]] = {}
    for run in section.runs:
        if not run.resumed:
            seconds = 0.0 if run.calibration is None else run.calibration.seconds
            shares.setdefault(run.method_name, []).append(seconds / run.training.seconds)
    return (
        {method: sum(found) / len(found) for method, found in shares.items()} if any(map(sum, shares.values())) else {}
    )


def _wrapped(method: str) -> str:
    """A method's name in lines that leave room for the plot."""
    return fill(method, 22)


def _lines(methods: Iterable[str]) -> int:
    """Number of lines of the names."""
    return sum(_wrapped(method).count("\n") + 1 for method in methods)


def _show_at_least(axes: Any, distance: float) -> None:
    """Extend the y axis to this distance below and above its middle, so that equal methods look equal."""
    low, high = axes.get_ylim()
    if high - low < 2 * distance:
        axes.set_ylim((low + high) / 2 - distance, (low + high) / 2 + distance)


def _draw(
    axes: Any,
    section: Section,
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    alpha: float | None = None,
    linestyle: str = "",
) -> dict[str, Any]:
    """Draw the points of each method, and return what stands for it in the legend.

    Colour and marker are by the method's place in the section, so they are the same in all plots.
    """
    lines = {}
    for method, found in points.items():
        number = list(section.methods).index(method)
        look = {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)], "markersize": 6}
        [lines[method]] = axes.plot(*zip(*found, strict=True), linestyle=linestyle, alpha=alpha, **look)
    return lines


def _add_legend(figure: Figure, lines: Mapping[str, Any], columns: int) -> None:
    names = [*map(_wrapped, lines)]
    figure.legend([*lines.values()], names, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


@contextmanager
def _drawing(width: float, height: float, panels: int = 1) -> Iterator[tuple[Figure, list[Any]]]:
    """A transparent figure with panels in two columns, which share the vertical axis."""
    with rc_context({"text.parse_math": False, "font.size": 10}):  # names are shown as they are, also with a $
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        grid = figure.subplots(-(-panels // 2), min(panels, 2), sharey=True, squeeze=False)
        every = list(grid.flat)
        for axes in every[panels:]:
            axes.remove()
        for axes in every[:panels]:
            axes.grid(alpha=0.3)
            axes.set_facecolor("none")
            axes.spines[["top", "right"]].set_visible(False)
        yield figure, every[:panels]


def _svg(figure: Figure) -> str:
    head, end, rest = svg_text(figure).partition(">")
    return f"{head}{end}{_DARK}{rest}"
