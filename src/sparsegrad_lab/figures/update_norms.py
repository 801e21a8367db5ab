"""Figure 7: how far each layer's weight moves in a run."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from .drawing import Drawing, new_figure, percent, set_title, shared_legend, short_name
from .training import FINE_TUNING, SPARSEGRAD

SHOWN = {FINE_TUNING: FINE_TUNING, SPARSEGRAD: "SparseGrad as published"}
RUN_COLOURS = {FINE_TUNING: "#888888", SPARSEGRAD: "#d95f02"}


def draw(data: dict[str, Any]) -> Drawing:
    """Draw a panel for each group of layers, bars for each block."""
    runs: dict[str, Any] = data["runs"]
    groups = list(runs[SPARSEGRAD]["norms"])
    figure = new_figure(0.6 + 4.6 * len(groups), 4.2)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    width = 0.8 / len(runs)
    numbers = []
    for axes, group in zip(panels, groups, strict=True):
        for number, (name, run) in enumerate(runs.items()):
            norms = np.asarray(run["norms"][group])
            places = np.arange(len(norms)) + (number - (len(runs) - 1) / 2) * width
            label = f"{SHOWN[name]}, learning rate {run['learning_rate']:g}"
            axes.bar(places, norms, width, color=RUN_COLOURS[name], label=label)
            numbers.append(f"{short_name(group)}, {SHOWN[name]}: {percent(norms.min())} to {percent(norms.max())}")
        axes.set_title(f"{data['roles'][group]} ({short_name(group)})", fontsize=10)
        axes.set_xlabel("block")
        shown = range(0, len(norms), max(1, len(norms) // 12))
        axes.set_xticks(shown, [str(data["block_numbers"][group][place]) for place in shown])
        axes.yaxis.set_major_formatter(PercentFormatter(1, None))
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("‖dW‖ / ‖W‖  (Frobenius)")
    shared_legend(figure, panels[0])
    steps = len(runs[SPARSEGRAD]["losses"])
    title = "How far each weight moves"
    set_title(figure, title, data, f", after {steps} steps")
    return Drawing.of(
        "update_norms", title,
        f"Relative Frobenius norm of each adapted layer's update after {steps} steps, by block. {'; '.join(numbers)}.",
        "Tall bars are blocks that the task changes most. The two runs have different learning rates, so compare the "
        "pattern over the blocks and not the heights.",
        figure,
    )  # fmt: skip
