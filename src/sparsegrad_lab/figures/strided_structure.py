"""Figure 3: which tokens have a gradient at all. The rows of the others in `∂L/∂y` are exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from sparsegrad_peft.method.gradients import stream_gradients

from .drawing import Drawing, draw_image, new_figure, percent, set_title, short_name
from .setup import Setup


class TokenKind(IntEnum):
    """What a token's row of `∂L/∂y` is."""

    padding = 0
    "zero: the token is padding"
    unread = 1
    "zero, though the token is no padding: nothing reads this position after the layer"
    live = 2
    "not zero"
    live_padding = 3
    "not zero, though the token is padding; no model should show it"


LABELS = {
    TokenKind.padding: ("#d9d9d9", "zero: padding"),
    TokenKind.unread: ("#f6b26b", "zero: nothing reads the token after this layer"),
    TokenKind.live: ("#3465a4", "not zero"),
    TokenKind.live_padding: ("#cc0000", "not zero, though padding"),
}


def token_kinds(
    setup: Setup, layers: Mapping[str, str], n_batches: int, offset: int, advance: Callable[[], None]
) -> dict[str, list[Tensor]]:
    """Backpropagate a few batches and classify their tokens. The model is left as it was.

    Args:
        setup: model and batches.
        layers: key -> name of a layer.
        n_batches: number of batches.
        offset: which batches, see `Setup.batches`.
        advance: called after each batch.

    Returns:
        key -> for each batch, the `TokenKind` of each token (batch, sequence).
    """
    masks: list[Tensor | None] = []  # None for images, whose patches are never padding
    live: dict[str, list[Tensor]] = {key: [] for key in layers}

    def before_backward(batch: Any) -> None:
        ids = batch.get("input_ids")
        mask = batch.get("attention_mask", None if ids is None else torch.ones_like(ids))
        masks.append(None if mask is None else mask.bool().cpu())
        advance()

    def watch(key: str) -> Callable[..., None]:
        def note(delta: Tensor) -> None:
            mask = masks[-1]
            rows = (delta != 0).any(-1).cpu()
            rows = rows if mask is None else rows.reshape(mask.shape)
            if len(live[key]) == len(masks):  # blocks share this layer, and it ran before
                rows |= live[key].pop()
            live[key].append(rows)

        def forward_hook(module: Any, inputs: Any, y: Tensor) -> None:
            if y.requires_grad:
                y.register_hook(note)

        return forward_hook

    with ExitStack() as hooks:
        for key, name in layers.items():
            handle = setup.model.get_submodule(name).register_forward_hook(watch(key))
            hooks.callback(handle.remove)
        stream_gradients(
            setup.model, dict.fromkeys(layers.values()), lambda name, G: None,
            step=setup.loss_step(offset, before_backward), n_steps=n_batches,
        )  # fmt: skip
    return {
        key: [
            classify(rows, torch.ones_like(rows) if mask is None else mask)
            for rows, mask in zip(live[key], masks, strict=True)
        ]
        for key in layers
    }


def classify(live: Tensor, mask: Tensor) -> Tensor:
    """Return each token's `TokenKind` (batch, sequence), from `live` (row not zero) and `mask` (no padding)."""
    return torch.where(
        live,
        torch.where(mask.bool(), TokenKind.live, TokenKind.live_padding),
        torch.where(mask.bool(), TokenKind.unread, TokenKind.padding),
    )


def kind_shares(batches: list[Tensor]) -> dict[str, float]:
    """Return the share of tokens of each kind, over several batches."""
    counts = torch.cat([kinds.flatten() for kinds in batches]).bincount(minlength=len(TokenKind)).double()
    return {kind.name: round(float(counts[kind] / counts.sum()), 6) for kind in TokenKind}


def draw(data: dict[str, Any]) -> Drawing:
    """Draw the tokens of a batch above, and below the shares through training, for a middle and the last block."""
    rows = data["rows"]
    last = next(iter(data["block_numbers"].values()))[-1]
    places = {"middle": f"block {data['block']}", "last": f"last block ({last})"}
    points = rows["shares"]
    means = {key: {k.name: sum(p[key][k.name] for p in points) / len(points) for k in TokenKind} for key in places}
    shown = [kind for kind in TokenKind if any(mean[kind.name] > 0 for mean in means.values())]
    figure = new_figure(10, 6.8)
    above, below = figure.subplots(2, 2, gridspec_kw={"height_ratios": (1.25, 1)})
    for axes, (key, place) in zip(above, places.items(), strict=True):
        _draw_tokens(axes, rows["tokens"][key])
        axes.set_title(f"{place}: {short_name(rows['layers'][key])}, one batch at the start", fontsize=10)
    for axes, (key, place) in zip(below, places.items(), strict=True):
        _draw_shares(axes, [(point["step"], point[key]) for point in points], shown)
        axes.set_title(f"{place}, fresh batches: {percent(means[key]['live'])} not zero", fontsize=10)
    figure.legend(handles=[Patch(facecolor=LABELS[kind][0], label=LABELS[kind][1]) for kind in shown],
                  loc="outside lower center", ncols=len(shown), fontsize=9, frameon=False)  # fmt: skip
    title = "Rows of the output gradient that are exactly zero"
    set_title(figure, title, data, f", batches of {len(rows['tokens']['middle'])}")
    numbers = [
        f"{place}: {percent(means[key]['live'])} not zero, {percent(means[key]['padding'])} padding, "
        f"{percent(means[key]['unread'])} unread"
        for key, place in places.items()
    ]
    return Drawing.of(
        "strided_structure", title,
        "Tokens of a batch by whether their row of dL/dy is exactly zero, and the shares through training; mean of "
        f"{len(points)} measurements: {'; '.join(numbers)}.",
        "Zero rows are padding and, in the last block, the positions that the head does not read. Skipping them is "
        "exact. How many there are depends on the batch and not on the method.",
        figure,
    )  # fmt: skip


def _draw_tokens(axes: Any, tokens: Any) -> None:
    """Draw the kinds of a batch's tokens, (batch, sequence)."""
    colours = ListedColormap([colour for colour, _ in LABELS.values()])
    draw_image(axes, tokens, tokens.shape, cmap=colours, norm=BoundaryNorm(np.arange(-0.5, 4), 4))
    axes.set(xlabel="position in the sequence", ylabel="row of the batch")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _draw_shares(axes: Any, points: list[tuple[int, dict[str, float]]], shown: list[TokenKind]) -> None:
    """Draw a stacked bar for each measurement: (step, share of each kind)."""
    bottom = np.zeros(len(points))
    for kind in reversed(shown):
        shares = np.array([share[kind.name] for _, share in points])
        axes.bar(range(len(points)), shares, bottom=bottom, color=LABELS[kind][0], width=0.7)
        bottom += shares
    axes.set_xticks(range(len(points)), [str(step) for step, _ in points])
    axes.set(xlabel="training step", ylabel="share of the tokens", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
