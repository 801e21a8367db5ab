"""Plots of a run and of a search, as PNG."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..tasks.task import display_name


def plot_curves(log: list[dict[str, Any]], metric: str, title: str) -> bytes:
    """Training loss, evaluation loss and score over the optimizer's steps.

    Args:
        log: `trainer.state.log_history`.
        metric: the score to plot, without "eval_".
        title: of the plot.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")  # without pyplot, which keeps global state
    losses, scores = figure.subplots(1, 2)
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
    figure.suptitle(title)
    return _as_png(figure, 120)


def plot_search(trials: list[dict[str, Any]], title: str) -> bytes:
    """Score over the learning rate, one colour per batch size.

    Args:
        trials: as in `search.json`.
        title: of the plot.
    """
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
    axes.set(xscale="log", xlabel="learning rate", ylabel="score", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _as_png(figure, 110)


def _as_png(figure: Figure, dpi: int) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
