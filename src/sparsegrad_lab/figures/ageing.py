"""Figure 5: how bases age, that is, how much of the gradient they gather in few entries as training goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.ticker import PercentFormatter
from torch import Tensor

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.gradients import stream_gradients
from sparsegrad_peft.method.selection import energy_share

from .drawing import Drawing, new_figure, percent, set_title, shared_legend, step_axis
from .setup import AGEING_BATCHES, DENSITY, Setup


def energy_shares(
    setup: Setup, bases: Mapping[str, Mapping[str, Basis]], n_batches: int, advance: Callable[..., None]
) -> dict[str, dict[str, float]]:
    """Measure how much of the gradient's energy the largest 1 % of entries hold, in each of several bases.

    The batches are the same in every call: shares differ more between batches than between two steps of training.

    Args:
        setup: model and batches.
        bases: way of calibration -> layer -> basis.
        n_batches: number of batches.
        advance: called after each batch.

    Returns:
        way -> role -> share, the mean over layers and batches.
    """
    shares: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in bases}

    def measure(name: str, G: Tensor) -> None:
        for way, by_layer in bases.items():
            shares[way][setup.role(name)].append(energy_share(by_layer[name].to_basis(G), DENSITY))

    layers = list(next(iter(bases.values())))
    stream_gradients(setup.model, layers, measure, step=setup.loss_step(AGEING_BATCHES, advance), n_steps=n_batches)
    return {
        way: {role: round(sum(values) / len(values), 6) for role, values in sorted(roles.items(), reverse=True)}
        for way, roles in shares.items()
    }


def draw(data: dict[str, Any]) -> Drawing:
    """Draw a panel for each role, a line for each way of calibration."""
    ways, points = data["ageing"]["ways"], data["ageing"]["points"]
    density = percent(data["density"])
    roles = list(points[0]["shares"][ways[0]])
    figure = new_figure(5 * len(roles), 4.9)
    panels = figure.subplots(1, len(roles), squeeze=False, sharey=True)[0]
    for axes, role in zip(panels, roles, strict=True):
        for number, way in enumerate(ways):
            at = [(point["step"], point["shares"][way][role]) for point in points if way in point["shares"]]
            style = {"color": f"C{number - 1}", "linestyle": "-"} if number else {"color": "black", "linestyle": "--"}
            axes.plot(*zip(*at, strict=True), marker="osD^vP"[number % 6], markersize=5, label=way, **style)
        axes.set_title(f"{role}-projections", fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        step_axis(axes, points[-1]["step"])
    panels[0].set_ylabel(f"energy in the largest {density} of entries")
    shared_legend(figure, panels[0])
    title = "How bases age"
    set_title(figure, title, data, ", regular fine-tuning; mean over layers, the same batches at each step")
    last = points[-1]
    numbers = [
        f"{way}: {', '.join(f'{role} {percent(share)}' for role, share in shares.items())}"
        for way, shares in last["shares"].items()
    ]
    mean = (
        " Bases of the mean gradient leave out what single batches do not share. So they hold less of one batch's "
        "gradient, part of which is noise."
        if data["mean_gradient"] else ""
    )  # fmt: skip
    return Drawing.of(
        "ageing", title,
        f"Share of the squared gradient in its largest {density} of entries against the training step. After "
        f"{last['step']} steps, {'; '.join(numbers)}.",
        "Where a line falls towards the dashed one, training moves the gradient out of that basis. The distance to the "
        f"dashed line is what the basis gains over the original space.{mean}",
        figure,
    )  # fmt: skip
