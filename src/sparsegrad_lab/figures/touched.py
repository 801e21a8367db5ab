"""Figure 6: which entries the published method has ever selected."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from .drawing import ROLE_COLOURS, Drawing, draw_image, new_figure, percent, set_title, step_axis


def draw(data: dict[str, Any]) -> Drawing:
    """Draw an image for each role, and the share of touched entries against the training step."""
    curves: dict[str, Any] = data["touched"]["touched"]
    images: dict[str, Any] = data["touched"]["images"]
    figure = new_figure(3.9 * (len(images) + 1) + 0.6, 4.2)
    *panels, growth = figure.subplots(1, len(images) + 1, squeeze=False)[0]
    high = max((float(np.nanmax(cells)) for cells in images.values() if np.isfinite(cells).any()), default=1.0)
    for axes, (role, cells) in zip(panels, images.items(), strict=True):
        image = draw_image(axes, cells, data["gradient"][role]["shape"], cmap="magma_r", vmin=0, vmax=high)
        axes.set_title(f"{role}: {percent(curves[role][-1])} of the entries touched", fontsize=10)
        axes.set(xlabel="direction of U, strongest first", ylabel="direction of V")
    figure.colorbar(image, ax=panels, label="share of a cell's entries", format=PercentFormatter(1, 0))
    steps, selected, total = len(curves["all"]) - 1, curves["all"][1], curves["all"][-1]
    for role in (*images, "all"):
        label, style = ("all layers", "--") if role == "all" else (f"{role}, block {data['block']}", "-")
        growth.plot(range(steps + 1), curves[role], color=ROLE_COLOURS[role], label=label, linestyle=style)
    growth.axhline(selected, color="black", linewidth=0.9, linestyle=":", label="selected in one step")
    growth.yaxis.set_major_formatter(PercentFormatter(1, None))
    growth.set_title("touched so far", fontsize=10)
    growth.set_ylim(bottom=0)
    step_axis(growth, steps)
    growth.legend(fontsize=8)
    title = "Which entries the published method touches"
    set_title(figure, title, data, f", block {data['block']}, {steps} steps, complete bases")
    of_block = "; ".join(f"{role} of block {data['block']}: {percent(curves[role][-1])}" for role in images)
    return Drawing.of(
        "touched", title,
        f"Images of the entries that were ever selected, and their share against the step. After {steps} steps with "
        f"{percent(selected)} selected in each: {percent(total)} of all layers' entries; {of_block}.",
        f"SparseGrad as published selects anew in each step. After {steps} steps it has changed {total / selected:.1f} "
        "times as many entries as one step selects. The default trains all entries of a small core instead.",
        figure,
    )  # fmt: skip
