"""Plots of a run and of a search, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from ..tasks.task import display_name

_LARGEST_MATRIX = 20
"Most classes of a confusion matrix in a plot."


def plot_curves(
    log: list[dict[str, Any]], metric: str, title: str, by_class: Mapping[str, Any] | None = None
) -> bytes:  # fmt: skip
    """Training loss, evaluation loss and score over the optimizer's steps; and the confusion matrix, if there is one.

    Args:
        log: `trainer.state.log_history`.
        metric: the score to plot, without "eval_".
        title: of the plot.
        by_class: `scores_by_class` of the final weights.
    """
    confusion = (by_class or {}).get("confusion", ())
    with_matrix = 0 < len(confusion) <= _LARGEST_MATRIX
    with rc_context({"text.parse_math": False}):  # names are shown as they are, also with a $
        figure = Figure(
            figsize=(12 if with_matrix else 8, 3.6), layout="constrained"
        )  # without pyplot: no global state
        losses, scores, *others = figure.subplots(1, 3 if with_matrix else 2)
        for axes, series, label in (
            (losses, "loss", "training"),
            (losses, "eval_loss", "evaluation"),
            (scores, f"eval_{metric}", display_name(metric)),
        ):
            points = [(entry["step"], entry[series]) for entry in log if series in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        losses.set(xlabel="step", ylabel="loss")
        scores.set(xlabel="step", ylabel=display_name(metric))
        losses.legend()
        for axes in (losses, scores):
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if with_matrix and by_class is not None:
            _draw_confusion(others[0], list(by_class["classes"]), confusion)
        figure.suptitle(title)
        return _as_png(figure, 120)


def _draw_confusion(axes: Any, names: list[str], confusion: Sequence[Sequence[int]]) -> None:
    """Number of rows by true and predicted class, coloured by the share of the true class."""
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(names) <= 8 else 6
    for row, counts in enumerate(confusion):
        for column, count in enumerate(counts):
            colour = "white" if shares[row][column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=size)
    short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
    axes.set_xticks(range(len(names)), short, rotation=30 if max(map(len, short)) > 4 else 0, fontsize=size)
    axes.set_yticks(range(len(names)), short, fontsize=size)
    axes.set(xlabel="predicted class", ylabel="true class", title="rows by class")


def plot_search(trials: list[dict[str, Any]], title: str) -> bytes:
    """Score over the learning rate, one colour per batch size.

    Args:
        trials: as in `search.json`.
        title: of the plot.
    """
    metric = display_name(next((t["metric"] for t in trials if t.get("metric")), "score"))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, size in enumerate(sorted({t["batch_size"] for t in trials if t["score"] is not None})):
        for state, marker in (("complete", "o"), ("cut short", "x")):
            points = [
                (t["learning_rate"], t["score"]) for t in trials if (t["batch_size"], t["state"]) == (size, state)
            ]
            if points:
                label = f"batch {size}, {state}"
                axes.scatter(*zip(*points, strict=True), marker=marker, color=f"C{colour}", label=label)
    axes.set(xscale="log", xlabel="learning rate", ylabel=metric, title=title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.tick_params(axis="x", rotation=30)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _as_png(figure, 110)


def _as_png(figure: Figure, dpi: int) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
