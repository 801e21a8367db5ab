"""Figure 3: which tokens have a gradient at all. The others' rows of `∂L/∂y` are exactly zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .drawing import Drawing, new_figure, of_run, percent, short

KINDS = {  # in the order of their numbers, see measure.py
    "padding": ("#d9d9d9", "zero: padding"),
    "unread": ("#f6b26b", "zero: a token that nothing reads after this layer"),
    "live": ("#3465a4", "not zero"),
    "live_padding": ("#cc0000", "not zero, though padding"),
}


def strided_structure(data: dict[str, Any]) -> Drawing:
    """Tokens of a batch above, shares through training below."""
    rows = data["rows"]
    places = {"middle": f"block {data['block']}", "last": f"last block ({data['blocks'] - 1})"}
    figure = new_figure(10, 6.8)
    above, below = figure.subplots(2, 2, gridspec_kw={"height_ratios": (1.25, 1)})
    colours = ListedColormap([colour for colour, _ in KINDS.values()])
    shown = [kind for kind in KINDS if any(look[key][kind] > 0 for look in rows["shares"] for key in places)]
    for axes, (key, place) in zip(above, places.items(), strict=True):
        tokens = np.array([[int(kind) for kind in row] for row in rows["tokens"][key]])
        axes.imshow(tokens, cmap=colours, norm=BoundaryNorm(np.arange(-0.5, 4), 4), aspect="auto",
                    interpolation="none", extent=(0, tokens.shape[1], tokens.shape[0], 0))  # fmt: skip
        axes.set(xlabel="position in the sequence", ylabel="row of the batch")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_title(f"{place}: {short(rows['layers'][key])}, one batch at the start", fontsize=10)
    looks = rows["shares"]
    for axes, (key, place) in zip(below, places.items(), strict=True):
        bottom = np.zeros(len(looks))
        for kind in shown[::-1]:
            shares = np.array([look[key][kind] for look in looks])
            axes.bar(range(len(looks)), shares, bottom=bottom, color=KINDS[kind][0], width=0.7)
            bottom += shares
        axes.set_xticks(range(len(looks)), [str(look["step"]) for look in looks])
        axes.set(xlabel="training step", ylabel="share of the tokens", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        live = sum(look[key]["live"] for look in looks) / len(looks)
        axes.set_title(f"{place}, fresh batches: {percent(live)} not zero", fontsize=10)
    figure.legend(handles=[Patch(facecolor=KINDS[kind][0], label=KINDS[kind][1]) for kind in shown],
                  loc="outside lower center", ncols=len(shown), fontsize=9, frameon=False)  # fmt: skip
    title = "Rows of the output gradient that are exactly zero"
    figure.suptitle(f"{title}\n{of_run(data)}, batches of {len(rows['tokens']['middle'])}", fontsize=11)
    words = []
    for key, place in places.items():
        mean = {kind: sum(look[key][kind] for look in looks) / len(looks) for kind in KINDS}
        words.append(f"{place}: {percent(mean['live'])} not zero, {percent(mean['padding'])} padding, "
                     f"{percent(mean['unread'])} unread")  # fmt: skip
    return Drawing(
        "strided_structure", title,
        f"Tokens of a batch by whether their row of dL/dy is exactly zero, and the shares through training; mean of "
        f"{len(looks)} looks: {'; '.join(words)}.",
        "The zero rows are padding and, in the last block, the positions that the head does not read: leaving them out "
        "of the products is exact, and how many there are is a matter of the batch, not of the method.",
        figure,
    )  # fmt: skip
