"""Figure 4: the spectra of the calibration gradients, and where the run's settings cut them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.calibrate import Calibration
from sparsegrad_peft.method.sides import is_selected
from sparsegrad_peft.method.sizes import Sizes

from .drawing import Drawing, new_figure, percent, set_title, short_name
from .setup import Setup, without_rank_warnings

SIDE_COLOURS = {"input": "#6a3d9a", "output": "#33a02c"}
DIRECTIONS, NEURONS = "directions", "neurons"
POINTS = 200
"""Points of a curve, evenly spaced in the logarithm of the direction's number; a large model has thousands."""


def measure(setup: Setup, calibration: Calibration, bases: Mapping[str, Basis], sizes: Sizes) -> list[dict[str, Any]]:
    """Measure both sides of each group that has a layer in the shown block.

    Args:
        setup: model and layers.
        calibration: the run's own.
        bases: layer -> complete basis from it.
        sizes: which rows a run would keep.

    Returns:
        For each side: "group", "role", "side", "kind" (`NEURONS` where the side selects features, else `DIRECTIONS`),
        "size" (number of them), "kept", "share_kept", and the arrays "at" (number, from 1, strongest first), "each"
        (its share of the energy) and "summed" (share of all up to it).
    """
    here = set(setup.layers_of(setup.block))
    groups = {name: gram for name, gram in calibration.groups.items() if here & set(gram.layers)}
    with without_rank_warnings():
        truncated = replace(calibration, groups=groups).bases(sizes=sizes)
    sides = []
    for group, gram in groups.items():
        basis, cut = bases[gram.layers[0]], truncated[group]
        for side, spectrum, rows, of_neurons in (("input", basis.spectrum_in, cut.U, cut.spectrum_in),
                                                 ("output", basis.spectrum_out, cut.V, cut.spectrum_out)):  # fmt: skip
            selected = is_selected(rows)
            spectrum = of_neurons if selected else spectrum
            assert spectrum is not None
            assert rows is not None
            shares = (spectrum.double() / spectrum.double().sum()).cpu().numpy()
            summed, kept = shares.cumsum(), len(rows)
            at = np.unique([*np.geomspace(1, len(shares), POINTS).round().astype(int), kept])
            sides.append({
                "group": group, "role": setup.role(gram.layers[0]), "side": side, "size": len(shares), "kept": kept,
                "kind": NEURONS if selected else DIRECTIONS,
                "share_kept": round(float(summed[kept - 1]), 6), "at": at, "each": shares[at - 1],
                "summed": summed[at - 1],
            })  # fmt: skip
    return sides


def draw(data: dict[str, Any]) -> Drawing:
    """Draw a row for each group: the share of each direction, and the summed share."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for side in data["spectrum"]:
        groups.setdefault(side["group"], []).append(side)
    figure = new_figure(10, 0.8 + 3.1 * len(groups))
    rows = figure.subplots(len(groups), 2, squeeze=False)
    for panels, (group, sides) in zip(rows, groups.items(), strict=True):
        name = f"{data['roles'].get(group, sides[0]['role'])} ({short_name(group)})"
        _draw_group(panels[0], panels[1], sides, name)
    numbers = [
        f"{short_name(side['group'])}, {side['side']}: {side['kept']} of {side['size']} {_kind(side)} keep "
        f"{percent(side['share_kept'])}"
        for side in data["spectrum"]
    ]
    mean = " A curve ends where batches no longer agree." if data["mean_gradient"] else ""
    title = "Spectrum of the calibration gradients"
    set_title(figure, title, data, f"; bases: {data['calibrated']}; dotted: the cut")
    return Drawing.of(
        "spectrum", title,
        "Share of the gradient energy by direction or neuron, and summed, with the number that the run's settings "
        f"keep: {'; '.join(numbers)}.",
        "The dotted lines show where the settings cut each side. What is left of a line is trained, the rest is "
        f"dropped. Neurons are not rotated, so more of them are needed for the same share.{mean}",
        figure,
    )  # fmt: skip


def _kind(side: Mapping[str, Any]) -> str:
    """What a side consists of; figures of an earlier version have directions only."""
    return str(side.get("kind", DIRECTIONS))


def _draw_group(each: Any, summed: Any, sides: list[dict[str, Any]], name: str) -> None:
    """Draw both sides of a group into its two panels."""
    for side in sides:
        colour, at, kept = SIDE_COLOURS[side["side"]], np.asarray(side["at"]), side["kept"]
        shares = np.asarray(side["each"])
        positive = shares > 0
        each.plot(at[positive], shares[positive], color=colour, label=f"{side['side']} side, {_kind(side)}")
        summed.plot(at, side["summed"], color=colour)
        label = f"{side['side']}: {kept} of {side['size']} {_kind(side)}, {percent(side['share_kept'])}"
        summed.plot([kept], [side["share_kept"]], "o", color=colour, label=label)
        for axes in (each, summed):
            axes.axvline(kept, color=colour, linestyle=":", linewidth=1.2)
    each.set(xscale="log", yscale="log", xlabel="number, strongest first", ylabel="share of the energy",
             ylim=(1e-7, 1))  # fmt: skip
    each.set_title(f"{name}: each", fontsize=10)
    each.legend(fontsize=8, loc="lower left")
    summed.set(xscale="log", xlabel="number of the strongest", ylabel="summed share", ylim=(0, 1.04))
    summed.yaxis.set_major_formatter(PercentFormatter(1, 0))
    summed.set_title(f"{name}: the strongest together", fontsize=10)
    summed.legend(fontsize=8, loc="lower right")
    for axes in (each, summed):
        axes.grid(alpha=0.3)
