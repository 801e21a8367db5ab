"""Figures 2 and 6: matrices as images. A gradient before and after the change of basis; which entries a run touched."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import PercentFormatter

from .drawing import COLOURS, Drawing, new_figure, of_run, percent, short, steps_axis
from .image import decode

EMPTY = "#f2f2f2"
"Colour of a cell without anything: an exact zero, or never selected."


def _image(axes: Any, image: dict[str, Any], shape: list[int], low: float, high: float, cmap: str) -> Any:
    """The cells, at the size of the matrix they stand for."""
    axes.set_facecolor(EMPTY)
    # Not smoothed; as many pixels in the file as there are cells.
    return axes.imshow(decode(image), cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="none",
                       extent=(0, shape[1], shape[0], 0))  # fmt: skip


def gradient_before_after(data: dict[str, Any]) -> Drawing:
    """`G` beside `V G Uᵀ`."""
    roles: dict[str, Any] = data["gradient"]
    figure = new_figure(9.6, 0.7 + 3.9 * len(roles))
    rows = figure.subplots(len(roles), 2, squeeze=False)
    words = []
    for panels, (role, found) in zip(rows, roles.items(), strict=True):
        names = ("G, original space", "V G Uᵀ, in the bases")
        for axes, image, share, name in zip(panels, found["images"], found["shares"], names, strict=True):
            shown = _image(axes, image, found["shape"], image["low"], image["high"], "viridis")
            axes.set_title(f"{role}: {name}\n{percent(share)} of the energy in {percent(data['density'])} of entries",
                           fontsize=10)  # fmt: skip
        panels[0].set(xlabel="input", ylabel="output")
        panels[1].set(xlabel="direction of U, strongest first", ylabel="direction of V")
        figure.colorbar(shown, ax=list(panels), label="log10 of the magnitude", shrink=0.9)
        before, after = found["shares"]
        words.append(f"{role} ({short(found['layer'])}): {percent(before)} before, {percent(after)} after")
    title = "A gradient before and after the change of basis"
    figure.suptitle(f"{title}\n{of_run(data)}, block {data['block']}, before the first step; bases: "
                    f"{data['calibrated']}", fontsize=11)  # fmt: skip
    return Drawing(
        "gradient_before_after", title,
        f"Images of G and of V G Uᵀ for block {data['block']}, log10 of the magnitude on one scale. Share of the "
        f"squared gradient in the largest {percent(data['density'])} of entries: {'; '.join(words)}.",
        "Bases that fit the gradient gather its large entries on the right in the corner of the strongest directions; "
        "the shares above the images say how much that gains.",
        figure,
    )  # fmt: skip


def touched(data: dict[str, Any]) -> Drawing:
    """Where the selected entries are, and how their number grows."""
    found = data["touched"]
    curves: dict[str, list[float]] = found["touched"]
    roles = list(found["images"])
    figure = new_figure(3.9 * (len(roles) + 1) + 0.6, 4.2)
    panels = figure.subplots(1, len(roles) + 1, squeeze=False)[0]
    high = max(float(decode(image).max()) for image in found["images"].values())
    for axes, role in zip(panels, roles, strict=False):
        shape = data["gradient"][role]["shape"]
        shown = _image(axes, found["images"][role], shape, 0, high, "magma_r")
        axes.set_title(f"{role}: {percent(curves[role][-1])} of the entries touched", fontsize=10)
        axes.set(xlabel="direction of U, strongest first", ylabel="direction of V")
    figure.colorbar(shown, ax=list(panels[:-1]), label="share of a cell's entries", format=PercentFormatter(1, 0))
    steps = len(curves["all"]) - 1
    names = {**{role: f"{role}, block {data['block']}" for role in roles}, "all": "all layers"}
    for role, name in names.items():
        panels[-1].plot(range(steps + 1), curves[role], color=COLOURS[role], label=name,
                        linestyle="--" if role == "all" else "-")  # fmt: skip
    selected = curves["all"][1]
    panels[-1].axhline(selected, color="black", linewidth=0.9, linestyle=":", label="selected in one step")
    panels[-1].yaxis.set_major_formatter(PercentFormatter(1, None))
    panels[-1].set_title("touched so far", fontsize=10)
    panels[-1].set_ylim(bottom=0)
    steps_axis(panels[-1], steps)
    panels[-1].legend(fontsize=8)
    title = "Which entries a run touches"
    figure.suptitle(f"{title}\n{of_run(data)}, block {data['block']}, {steps} steps, complete bases", fontsize=11)
    return Drawing(
        "touched", title,
        f"Images of where entries were ever selected, and the share touched against the step. After {steps} steps with "
        f"{percent(selected)} selected in each: {percent(curves['all'][-1])} of all layers' entries; "
        + "; ".join(f"{role} of block {data['block']}: {percent(curves[role][-1])}" for role in roles) + ".",
        f"Each step selects anew: after {steps} steps, {curves['all'][-1] / selected:.1f} times as many entries have "
        "changed as one step selects, and that is what the run's update consists of.",
        figure,
    )  # fmt: skip
