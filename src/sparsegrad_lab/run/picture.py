"""Loss and score of a run as an image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .folder import write_whole


def curves(log: list[dict[str, Any]], metric: str, title: str) -> bytes:
    """A PNG of the training and evaluation loss, and of the score, against the optimizer's steps.

    Args:
        log: `trainer.state.log_history`.
        metric: which score to draw, without "eval_".
        title: of the picture.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")  # no pyplot: no window, no state
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    for axes, series, label in (
        (losses, "loss", "training"),
        (losses, "eval_loss", "evaluation"),
        (scores, f"eval_{metric}", metric.replace("_", " ")),
    ):
        points = [(entry["step"], entry[series]) for entry in log if series in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    losses.set(xlabel="step", ylabel="loss")
    scores.set(xlabel="step", ylabel=metric.replace("_", " "))
    losses.legend()
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def write_curves(path: Path, log: list[dict[str, Any]], metric: str, title: str) -> None:
    """Draw and write it."""
    write_whole(path, curves(log, metric, title))


def search_picture(trials: list[dict[str, Any]], title: str) -> bytes:
    """A PNG of the score against the learning rate, a colour for each batch size."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for colour, size in enumerate(sorted({t["batch_size"] for t in trials if t["score"] is not None})):
        for state, marker in (("complete", "o"), ("cut short", "x")):
            points = [
                (t["learning_rate"], t["score"]) for t in trials if (t["batch_size"], t["state"]) == (size, state)
            ]
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, color=f"C{colour}",
                             label=f"batch {size}, {state}")  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate", ylabel="score", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
