"""Figures 4, 5 and 7: spectra of the bases, how bases age, and how far each layer's weight moves."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from .drawing import Drawing, new_figure, of_run, percent, short, steps_axis

SIDES = {"input": "#6a3d9a", "output": "#33a02c"}
RUNS = {"regular fine-tuning": "#888888", "SparseGrad": "#d95f02"}


def spectrum(data: dict[str, Any]) -> Drawing:
    """Energy by direction, and the cut."""
    found: list[dict[str, Any]] = data["spectrum"]
    groups = list(dict.fromkeys(side["group"] for side in found))
    figure = new_figure(10, 0.8 + 3.1 * len(groups))
    rows = figure.subplots(len(groups), 2, squeeze=False)
    words = []
    for (each, summed), group in zip(rows, groups, strict=True):
        for side in (side for side in found if side["group"] == group):
            colour, shares = SIDES[side["side"]], np.array(side["each"])
            directions, kept = np.array(side["at"]), side["kept"]
            positive = shares > 0
            each.plot(directions[positive], shares[positive], color=colour, label=f"{side['side']} side")
            label = f"{side['side']} side: {kept} of {side['size']} kept, {percent(side['share_kept'])}"
            summed.plot(directions, side["summed"], color=colour)
            summed.plot([kept], [side["share_kept"]], "o", color=colour, label=label)
            for axes in (each, summed):
                axes.axvline(kept, color=colour, linestyle=":", linewidth=1.2)
            words.append(f"{short(group)}, {side['side']}: {kept} of {side['size']} directions keep "
                         f"{percent(side['share_kept'])}")  # fmt: skip
        role = data["roles"].get(group, side["role"])
        each.set(xscale="log", yscale="log", xlabel="direction, strongest first", ylabel="share of the energy",
                 ylim=(1e-7, 1))  # fmt: skip
        each.set_title(f"{role} ({short(group)}): each direction", fontsize=10)
        summed.set(xscale="log", xlabel="directions", ylabel="summed share", ylim=(0, 1.04))
        summed.yaxis.set_major_formatter(PercentFormatter(1, 0))
        summed.set_title(f"{role}: leading directions together", fontsize=10)
        each.legend(fontsize=8, loc="lower left")
        summed.legend(fontsize=8, loc="lower right")
        for axes in (each, summed):
            axes.grid(alpha=0.3)
    title = "Spectrum of the calibration gradients"
    figure.suptitle(f"{title}\n{of_run(data)}; bases: {data['calibrated']}; dotted: the cut", fontsize=11)
    return Drawing(
        "spectrum", title,
        f"Share of the gradient energy by direction, and summed, with the number of directions that the run's settings "
        f"keep: {'; '.join(words)}.",
        "The dotted lines are where the settings cut each side: what lies left of them is trained, what lies right of "
        "them is given up.",
        figure,
    )  # fmt: skip


def ageing(data: dict[str, Any]) -> Drawing:
    """Share of energy in the largest entries, by way of calibrating."""
    found = data["ageing"]
    points = found["points"]
    roles = list(points[0]["shares"][found["ways"][0]])
    figure = new_figure(5 * len(roles), 4.9)
    panels = figure.subplots(1, len(roles), squeeze=False, sharey=True)[0]
    for axes, role in zip(panels, roles, strict=True):
        for number, way in enumerate(found["ways"]):
            at = [(point["step"], point["shares"][way][role]) for point in points if way in point["shares"]]
            style = {"color": f"C{number - 1}", "linestyle": "-"} if number else {"color": "black", "linestyle": "--"}
            axes.plot(*zip(*at, strict=True), marker="osD^vP"[number % 6], markersize=5, label=way, **style)
        axes.set_title(f"{role}-projections", fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        steps_axis(axes, points[-1]["step"])
    panels[0].set_ylabel(f"energy in the largest {percent(data['density'])} of entries")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    title = "How bases age"
    figure.suptitle(
        f"{title}\n{of_run(data)}, regular fine-tuning; mean over layers, the same batches at each step", fontsize=11
    )
    last = points[-1]
    words = [
        f"{way}: {', '.join(f'{role} {percent(share)}' for role, share in shares.items())}"
        for way, shares in last["shares"].items()
    ]
    return Drawing(
        "ageing", title,
        f"Share of the squared gradient in its largest {percent(data['density'])} of entries against the training "
        f"step. After {last['step']} steps, {'; '.join(words)}.",
        "A line that falls towards the dashed one is a basis that the gradient moves away from; how far a line stays "
        "above the original space is what the basis is worth at that step.",
        figure,
    )  # fmt: skip


def update_norms(data: dict[str, Any]) -> Drawing:
    """How far each layer's weight has moved."""
    runs: dict[str, Any] = data["runs"]
    groups = list(next(iter(runs.values()))["norms"])
    figure = new_figure(0.6 + 4.6 * len(groups), 4.2)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    width = 0.8 / len(runs)
    words = []
    for axes, group in zip(panels, groups, strict=True):
        for number, (name, run) in enumerate(runs.items()):
            norms = np.array(run["norms"][group])
            places = np.arange(len(norms)) + (number - (len(runs) - 1) / 2) * width
            axes.bar(places, norms, width, color=RUNS[name], label=f"{name}, learning rate {run['learning_rate']:g}")
            words.append(f"{short(group)}, {name}: {percent(norms.min())} to {percent(norms.max())}")
        axes.set_title(f"{data['roles'][group]} ({short(group)})", fontsize=10)
        axes.set_xlabel("block")
        axes.set_xticks(range(0, len(norms), max(1, len(norms) // 12)))
        axes.yaxis.set_major_formatter(PercentFormatter(1, None))
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("‖dW‖ / ‖W‖  (Frobenius)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    steps = len(next(iter(runs.values()))["losses"])
    title = "How far each weight moves"
    figure.suptitle(f"{title}\n{of_run(data)}, after {steps} steps", fontsize=11)
    return Drawing(
        "update_norms", title,
        f"Relative Frobenius norm of each adapted layer's update after {steps} steps, by block. {'; '.join(words)}.",
        "Blocks with tall bars are those that the task changes most; the two runs have learning rates of their own, so "
        "compare the shape over the blocks rather than the heights.",
        figure,
    )  # fmt: skip
