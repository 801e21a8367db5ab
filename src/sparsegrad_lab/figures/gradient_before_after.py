"""Figure 2: the gradient of two layers as images, before and after the change of basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.gradients import stream_gradients
from sparsegrad_peft.method.selection import energy_share

from .cells import log_magnitude
from .drawing import Drawing, draw_image, new_figure, percent, set_title, short_name
from .setup import DENSITY, SHOWN_BATCHES, Setup

PANELS = ("G, original space", "V G Uᵀ, in the bases")


def measure(setup: Setup, bases: Mapping[str, Basis], advance: Callable[..., None]) -> dict[str, Any]:
    """Take the gradient of one batch for the shown block.

    Returns:
        role -> "layer", "shape" (out, in), "shares" (energy in the largest 1 % of entries, before and after) and
        "images" (2, rows, columns): log10 of the magnitudes before and after; NaN is an exact zero.
    """
    measured: dict[str, Any] = {}
    roles = {name: role for role, name in setup.shown_layers.items()}

    def keep(name: str, G: Tensor) -> None:
        pair = (G, bases[name].to_basis(G))
        measured[roles[name]] = {
            "layer": name, "shape": list(G.shape),
            "shares": [round(energy_share(matrix, DENSITY), 6) for matrix in pair],
            "images": np.stack([log_magnitude(matrix) for matrix in pair]),
        }  # fmt: skip

    stream_gradients(setup.model, roles, keep, step=setup.loss_step(SHOWN_BATCHES, advance), n_steps=1)
    return {role: measured[role] for role in setup.shown_layers}


def colour_range(images: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the range for both images: from the weakest hundredth of the cells to the strongest cell."""
    values = images[np.isfinite(images)].astype(float)
    return (float(np.quantile(values, 0.01)), float(values.max())) if values.size else (-1.0, 0.0)


def draw(data: dict[str, Any]) -> Drawing:
    """Draw a row for each role: `G` beside `V G Uᵀ`."""
    roles: dict[str, Any] = data["gradient"]
    density = percent(data["density"])
    figure = new_figure(9.6, 0.7 + 3.9 * len(roles))
    rows = figure.subplots(len(roles), 2, squeeze=False)
    numbers = []
    for panels, (role, layer) in zip(rows, roles.items(), strict=True):
        low, high = colour_range(layer["images"])
        for axes, cells, share, name in zip(panels, layer["images"], layer["shares"], PANELS, strict=True):
            image = draw_image(axes, cells, layer["shape"], cmap="viridis", vmin=low, vmax=high)
            axes.set_title(f"{role}: {name}\n{percent(share)} of the energy in {density} of entries", fontsize=10)
        panels[0].set(xlabel="input", ylabel="output")
        panels[1].set(xlabel="direction of U, strongest first", ylabel="direction of V")
        figure.colorbar(image, ax=list(panels), label="log10 of the magnitude", shrink=0.9)
        before, after = layer["shares"]
        numbers.append(f"{role} ({short_name(layer['layer'])}): {percent(before)} before, {percent(after)} after")
    mean = (
        " Bases of the mean gradient begin with the directions that all batches share, and end with those in which "
        "batches disagree: the other edges are bright too. A run keeps the beginning only."
        if data["mean_gradient"] else ""
    )  # fmt: skip
    title = "A gradient before and after the change of basis"
    set_title(figure, title, data, f", block {data['block']}, before the first step; bases: {data['calibrated']}")
    return Drawing.of(
        "gradient_before_after", title,
        f"Images of G and of V G Uᵀ for block {data['block']}: log10 of the magnitude, both on one scale. Share of the "
        f"squared gradient in the largest {density} of entries: {'; '.join(numbers)}.",
        "With good bases the large entries on the right gather in the corner of the strongest directions. The titles "
        f"give the share of the energy in the largest entries.{mean}",
        figure,
    )  # fmt: skip
